"""Configuration keys that many classes share, with their defaults."""

BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995)
CURVES = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
