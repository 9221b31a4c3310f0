"""How the pass is handed to a compiler: npugraph_ex, and a plain backend for CPU."""
