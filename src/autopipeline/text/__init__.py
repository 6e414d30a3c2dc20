"""CLIP's, T5's, Gemma's, BERT's and Llama's tokenizers, on the `tokenizers` library."""

from autopipeline.text.bert import BertTokenizer
from autopipeline.text.clip import CLIPTokenizer
from autopipeline.text.gemma import GemmaTokenizer
from autopipeline.text.llama import LlamaTokenizer
from autopipeline.text.t5 import T5Tokenizer

__all__ = ["BertTokenizer", "CLIPTokenizer", "GemmaTokenizer", "LlamaTokenizer", "T5Tokenizer"]
