"""The public surface of older GPTQ tools over fewbit's own: a script changes its import line.

Importing this imports none of them, and changes nothing anywhere.
"""
