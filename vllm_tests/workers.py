"""What vLLM's workers can be asked (``LLM.collective_rpc("observe")``): vLLM makes ``Extension`` a base of its worker."""

import json


class Extension:
    def observe(self):
        """What the plugin did on this rank, and what was captured."""
        from moe_lowering import agreement_rounds, simulator
        from moe_lowering.integrations import vllm

        counts = simulator.device.counts()
        return {
            "layers": vllm.layers(),
            "reports": [json.loads(json.dumps(report.to_json(), default=str)) for report in vllm.reports()],
            "captured": [tape.operators for tape in simulator.device.tapes()],
            "rounds": [dict(of._rounds) for store in agreement_rounds._sessions.values() for of in store.values()],
            "captures": counts.captured,
            "replays": counts.replayed,
        }
