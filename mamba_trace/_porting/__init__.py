"""The parts of `mamba_trace.porting`, none of which runs the script or imports torch.

What a name stands for (`scope`), which place a hook name means (`names`), what a hook function does
(`hooks`), keys of caches (`keys`), the lines of a trace that edit (`traces`) and read (`reads`), the calls
that run a model (`runs`, `gathered`, `calls`, with `advice`), loading (`loading`), the script, statement by
statement (`expressions`, `script`, `tidy`), and what was found in it (`findings`).
"""
