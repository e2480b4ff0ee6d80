"""The two-stage sampler: a picture from one model, refined by another, to see a merge.

schedule       steps, shift, scheduler and strength -> noise levels
request        what can be asked: shots, stages, a request of both
inputs         pictures and prompts out of files
parts          text encoder, tokenizer and VAE on this disk; what a model, its LoRAs and they must have in common
architectures  the tensors of a text encoder and a VAE, from their configs
settings       options, presets and defaults -> a request, with everything looked at that headers tell
               (up to here nothing imports torch)
samplers       how a velocity is followed: euler, res_multistep, dpmpp_2m_sde
load           checkpoints and folders -> transformer, text encoder, VAE
denoise        a transformer with guidance, followed by a sampler
studio         prompts -> captions -> latents -> pictures, with one model in memory at a time
session        one request through all of it
written, sheet contact sheets and PNG metadata
"""
