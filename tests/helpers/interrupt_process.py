"""Processes that are interrupted while they compile: what ``test_interrupts`` starts.

    python interrupt_process.py here                one process: signals to itself from within the pass
    python interrupt_process.py command ARGUMENT... ``moe-lowering ARGUMENT...``, for signals from outside

In every process of it, ranks too, the pass writes "compiling PID" to stderr, and then does not end.
"""

import os
import signal
import sys
import time

import moe_lowering
from moe_lowering import MoeLowering, cli, interrupts

send = None  # the signal that the pass sends, once; None: it waits for one


def compiling(*given):
    global send
    number, send = send, None
    os.write(2, f"compiling {os.getpid()}\n".encode())
    if number is not None:
        os.kill(os.getpid(), number)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.05)


MoeLowering.__call__ = compiling


def outcome(number, call):
    """How a call ends in which the signal comes."""
    global send
    send = number
    try:
        return f"returned {call()}"
    except BaseException as error:
        return type(error).__name__


def here():
    command = ["lower", "moe", "--layers", "1", "--tokens", "4"]
    ends = {number: outcome(number, lambda: cli.main(command)) for number in interrupts.ERRORS}
    print("command:", *ends.values())
    print("handlers:", *(signal.getsignal(number).__module__ for number in interrupts.ERRORS))

    import torch
    import transformers

    def compiled():
        torch._dynamo.reset()
        options = moe_lowering.npugraph_ex_options(moe_lowering.Deployment(), force_eager=True)
        torch.compile(torch.relu, backend="npugraph_ex", options=options)(torch.ones(2))

    def asked():
        with moe_lowering.interruptible():
            compiled()

    print("asked:", *(outcome(number, asked) for number in interrupts.ERRORS))
    print("not asked:", *(outcome(number, compiled) for number in interrupts.ERRORS))

    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
    )  # fmt: skip
    moe_lowering.integrations.transformers.register()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.set_experts_implementation("moe_lowering")
    server = moe_lowering.serving.Server(model, buckets=(1,), max_length=8, prefill_lengths=(), force_eager=True)
    print("server:", outcome(signal.SIGINT, server.warm_up), flush=True)
    global send
    send = signal.SIGTERM
    server.warm_up()
    print("the server lives on")


if __name__ == "__main__":
    # as a shell in the background starts it, SIGINT is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[1] == "here":
        here()
    else:
        sys.exit(cli.main(sys.argv[2:]))
