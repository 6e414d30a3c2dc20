"""Configuration keys that many classes share, with their defaults."""

from typing import Any

Keys = dict[str, Any]
LINEAR: Keys = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
BETAS = LINEAR | dict(trained_betas=None)
LATENT = BETAS | dict(beta_start=0.00085, beta_end=0.012)
THRESHOLD: Keys = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
CURVES: Keys = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
FLOWS: Keys = dict(use_flow_sigmas=False, flow_shift=1.0)
SHIFTS: Keys = dict(use_dynamic_shifting=False, time_shift_type="exponential")
SPACING: Keys = dict(timestep_spacing="linspace", steps_offset=0)
LEADING = SPACING | dict(timestep_spacing="leading")
ENDS: Keys = dict(final_sigmas_type="zero")
RESCALED: Keys = dict(rescale_betas_zero_snr=False)
SPACED = SPACING | RESCALED
