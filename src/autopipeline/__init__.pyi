"""autopipeline: any diffusion checkpoint, any task, the right pipeline. Written by autopipeline.stub."""

from typing import Any

from autopipeline.auto import AutoPipeline as AutoPipeline
from autopipeline.auto import AutoPipelineForImage2Image as AutoPipelineForImage2Image
from autopipeline.auto import AutoPipelineForInpainting as AutoPipelineForInpainting
from autopipeline.auto import AutoPipelineForText2Image as AutoPipelineForText2Image
from autopipeline.errors import Cancelled as Cancelled
from autopipeline.errors import CheckpointError as CheckpointError
from autopipeline.errors import NotFiniteError as NotFiniteError
from autopipeline.images import CLIPImageProcessor as CLIPImageProcessor
from autopipeline.models.autoencoder_kl import AutoencoderKL as AutoencoderKL
from autopipeline.models.autoencoder_tiny import AutoencoderTiny as AutoencoderTiny
from autopipeline.models.clip import CLIPTextModel as CLIPTextModel
from autopipeline.models.clip import CLIPTextModelWithProjection as CLIPTextModelWithProjection
from autopipeline.models.clip import CLIPVisionModelWithProjection as CLIPVisionModelWithProjection
from autopipeline.models.unet import UNet2DConditionModel as UNet2DConditionModel
from autopipeline.pipeline import DiffusionPipeline as DiffusionPipeline
from autopipeline.pipeline import Output as Output
from autopipeline.schedulers import DDIMScheduler as DDIMScheduler
from autopipeline.schedulers import DDPMScheduler as DDPMScheduler
from autopipeline.schedulers import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
from autopipeline.schedulers import EDMDPMSolverMultistepScheduler as EDMDPMSolverMultistepScheduler
from autopipeline.schedulers import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
from autopipeline.schedulers import EulerDiscreteScheduler as EulerDiscreteScheduler
from autopipeline.schedulers import HeunDiscreteScheduler as HeunDiscreteScheduler
from autopipeline.schedulers import LCMScheduler as LCMScheduler
from autopipeline.schedulers import PNDMScheduler as PNDMScheduler
from autopipeline.schedulers import UniPCMultistepScheduler as UniPCMultistepScheduler
from autopipeline.selection import Explanation as Explanation
from autopipeline.selection import explain as explain
from autopipeline.text import CLIPTokenizer as CLIPTokenizer

__version__: str

class LatentConsistencyModelImg2ImgPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        num_inference_steps: Any = 4,
        strength: Any = 0.8,
        original_inference_steps: Any = None,
        timesteps: Any = None,
        guidance_scale: Any = 8.5,
        num_images_per_prompt: Any = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class LatentConsistencyModelPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: Any = 4,
        original_inference_steps: Any = None,
        timesteps: Any = None,
        guidance_scale: Any = 8.5,
        num_images_per_prompt: Any = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        image: Any = None,
        strength: Any = None,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class StableDiffusionImg2ImgPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        strength: Any = 0.8,
        num_inference_steps: Any = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        guidance_scale: Any = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: Any = 1,
        eta: Any = 0.0,
        generator: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: Any = None,
        width: Any = None,
        padding_mask_crop: Any = None,
        latents: Any = None,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class StableDiffusionInpaintPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: Any = None,
        width: Any = None,
        padding_mask_crop: Any = None,
        strength: Any = 1.0,
        num_inference_steps: Any = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        guidance_scale: Any = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: Any = 1,
        eta: Any = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class StableDiffusionPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: Any = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        guidance_scale: Any = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: Any = 1,
        eta: Any = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        guidance_rescale: Any = 0.0,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        image: Any = None,
        strength: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        padding_mask_crop: Any = None,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class StableDiffusionXLImg2ImgPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        strength: Any = 0.3,
        num_inference_steps: Any = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        denoising_start: Any = None,
        denoising_end: Any = None,
        guidance_scale: Any = 5.0,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        num_images_per_prompt: Any = 1,
        eta: Any = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        guidance_rescale: Any = 0.0,
        original_size: Any = None,
        crops_coords_top_left: Any = (0, 0),
        target_size: Any = None,
        negative_original_size: Any = None,
        negative_crops_coords_top_left: Any = (0, 0),
        negative_target_size: Any = None,
        aesthetic_score: Any = 6.0,
        negative_aesthetic_score: Any = 2.5,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: Any = None,
        width: Any = None,
        padding_mask_crop: Any = None,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class StableDiffusionXLInpaintPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: Any = None,
        width: Any = None,
        padding_mask_crop: Any = None,
        strength: Any = 0.9999,
        num_inference_steps: Any = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        denoising_start: Any = None,
        denoising_end: Any = None,
        guidance_scale: Any = 7.5,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        num_images_per_prompt: Any = 1,
        eta: Any = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        guidance_rescale: Any = 0.0,
        original_size: Any = None,
        crops_coords_top_left: Any = (0, 0),
        target_size: Any = None,
        negative_original_size: Any = None,
        negative_crops_coords_top_left: Any = (0, 0),
        negative_target_size: Any = None,
        aesthetic_score: Any = 6.0,
        negative_aesthetic_score: Any = 2.5,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...

class StableDiffusionXLPipeline(DiffusionPipeline):
    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: Any = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        denoising_end: Any = None,
        guidance_scale: Any = 5.0,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        num_images_per_prompt: Any = 1,
        eta: Any = 0.0,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        output_type: Any = 'pil',
        return_dict: Any = True,
        cross_attention_kwargs: Any = None,
        guidance_rescale: Any = 0.0,
        original_size: Any = None,
        crops_coords_top_left: Any = (0, 0),
        target_size: Any = None,
        negative_original_size: Any = None,
        negative_crops_coords_top_left: Any = (0, 0),
        negative_target_size: Any = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = ('latents',),
        *,
        image: Any = None,
        strength: Any = None,
        denoising_start: Any = None,
        aesthetic_score: Any = None,
        negative_aesthetic_score: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        padding_mask_crop: Any = None,
        seed: Any = None,
        cancel: Any = None,
    ) -> Any: ...
