"""Speed and memory of whole models on this machine, for `fewbit bench` and the scripts in benchmarks/."""
