"""``moe-lowering simulate``: runs a program on the simulator, without a change to the program."""
