"""Prompts that the model goes on with."""

from mamba_lens import HookedMamba

model = HookedMamba.from_pretrained("state-spaces/mamba-130m")
prompt = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"

ids = model.generate(model.to_tokens(prompt), 3, do_sample=False)
texts = [model.generate(prompt, max_new_tokens=4, do_sample=False, verbose=False)]
with_the_token = model.generate(prompt, 4, do_sample=False, return_type="tokens")
without = model.generate(prompt, 4, do_sample=False, prepend_bos=False, return_type="tensor")
further = model.generate(f"{prompt} Emma", 6, stop_at_eos=False, do_sample=False, return_type="tokens")
unasked = model.generate(prompt, do_sample=False, use_past_kv_cache=False, return_type="tokens")
