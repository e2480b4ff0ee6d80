"""The two-stage sampler: a picture from one model, refined by another, to see what a merge makes.

schedule   steps, shift and strength -> noise levels (no torch)
load       checkpoints and folders -> transformer, text encoder, VAE
denoise    the loop
studio     prompts -> captions -> latents -> pictures, with one model in memory at a time
sheet      contact sheets and PNG metadata
"""
