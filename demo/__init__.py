"""The small model that ships: procedural scenes, their exact scorer, and the training recipe.

One command, `python -m demo train`, makes everything from nothing: captioned pictures are drawn by
formula (scenes), their latents come from a fixed linear map (latents), a TAESD-shaped VAE learns to
read and draw those latents (vae), an SD3-shaped MMDiT with a small CLIP-L learns rectified flow on
them, a second one its guided velocity, so that no CFG is needed, and a third the straight way to
the second one's pictures, mended where they are wrong (nearest), so that few steps are needed
(recipe). `python -m demo score` measures the result on captions kept out of training.
"""
