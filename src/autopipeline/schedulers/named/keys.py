"""Configuration keys that many classes share, with their defaults."""

BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None)
LATENT = BETAS | dict(beta_start=0.00085, beta_end=0.012)
THRESHOLD = dict(thresholding=False, dynamic_thresholding_ratio=0.995)
CURVES = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
FLOWS = dict(use_flow_sigmas=False, flow_shift=1.0)
SHIFTS = dict(use_dynamic_shifting=False, time_shift_type="exponential")
SPACING = dict(timestep_spacing="linspace", steps_offset=0)
ENDS = dict(final_sigmas_type="zero")
RESCALED = dict(rescale_betas_zero_snr=False)
