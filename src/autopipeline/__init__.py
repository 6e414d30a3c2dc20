"""autopipeline: any diffusion checkpoint, any task, the right pipeline, fast."""

__version__ = "0.1.0"
