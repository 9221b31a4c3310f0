"""A placement of 16 experts on two ranks with 18 places, for ``expert_map_path`` of vllm-ascend."""

import json

# Physical experts of each rank, by layer: two of them twice, and the second layer's in no order
PLACEMENTS = (
    ((0, 1, 2, 3, 4, 5, 6, 7, 8), (8, 9, 10, 11, 12, 13, 14, 15, 0)),
    ((5, 3, 15, 0, 8, 2, 7, 6, 9), (8, 10, 11, 4, 12, 1, 14, 13, 3)),
)


def expert_map():
    """In the format of vllm-ascend's ``expert_map_path``."""
    layers = [
        {
            "layer_id": layer,
            "device_count": len(ranks),
            "device_list": [{"device_id": i, "device_expert": list(experts)} for i, experts in enumerate(ranks)],
        }
        for layer, ranks in enumerate(PLACEMENTS)
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


def write(folder):
    """The placement as a file; ``additional_config`` that names it."""
    path = folder / "experts.json"
    path.write_text(json.dumps(expert_map()))
    return {"eplb_config": {"expert_map_path": str(path)}}
