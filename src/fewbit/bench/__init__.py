"""How fast quantized models and layers are on this machine, next to others measured in the same run.

- `rounds`: candidates take turns, so that what slows the machine for a while slows all of them;
- `machine`: what it could reach: read bandwidth and arithmetic;
- `gpu`: the same of a GPU, and its clock;
- `layers`: one layer shape at a time; `llama`: the shapes of well-known models;
- `worker`, `models`: whole models, one process each.

Nothing here prints; `fewbit bench` and the scripts in benchmarks/ do.
"""
