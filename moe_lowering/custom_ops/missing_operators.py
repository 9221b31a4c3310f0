"""The error of a wrapper whose operator of vllm-ascend is not registered in this process: why it is missing, and what to do.

The reason is one of four: the installed version has removed the operator, a library is loaded that does not have it, the
library is installed and was not imported, or none is installed.
"""

from __future__ import annotations

import torch

from moe_lowering.providers import Package, installed_providers

PROVIDER, NAMESPACE = "vllm_ascend", "_C_ascend"
LIBRARY = "vllm_ascend.vllm_ascend_C"
SOC = "A3"  # where the fused operators exist; which versions have them does not depend on it


def why_absent(operator: str) -> str:
    """One sentence for ``torch.ops._C_ascend.<operator>``, and what to do."""
    absent = f"torch.ops.{NAMESPACE}.{operator} is not there"
    package = next((package for package in installed_providers() if package.name == PROVIDER), None)
    if package is not None and (removed := _describe_removal(operator, package)):
        return f"{absent}: {removed}"
    if _library_is_loaded():
        which = f"of {package.version_text}" if package is not None else "of a vllm-ascend whose version is not known"
        return f"{absent}: the library {which} is loaded and has no such operator; install one that has it (docs/provider.md)"
    if package is not None:
        return f"{absent}: {package.version_text} is installed and not loaded; import {LIBRARY} before the first call"
    return f"{absent}; install vllm-ascend with its kernels for {SOC} and import {LIBRARY} before the first call"


def _describe_removal(operator: str, package: Package) -> str:
    """The text of the rule that the operator was removed before this version; "" when there is no such rule."""
    from moe_lowering.limits import limits_for  # the tables are read when they are needed first
    from moe_lowering.limits.versions import name_subject

    versions = {package.name: package.version}
    for row in limits_for(operator, SOC, versions):
        if row.code.endswith(".removed"):
            return f"{row.says.format(version=name_subject(row.versions, versions))}; {row.advice}"
    return ""


def _library_is_loaded() -> bool:
    return any(name.startswith(f"{NAMESPACE}::") for name in torch._C._dispatch_get_all_op_names())
