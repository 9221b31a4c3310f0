"""Why a layer stays with vllm-ascend's operator."""

from __future__ import annotations


class Refused(Exception):
    """A layer stays with vllm-ascend's operator: a code in brackets, what was found and what is accepted."""


def refuse(code: str, what: str, value: object, accepted: str) -> Refused:
    return Refused(f"[vllm.{code}] {what} is {value}; accepted: {accepted}")
