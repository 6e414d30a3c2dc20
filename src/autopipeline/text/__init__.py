"""The tokenizers of CLIP, T5, Gemma, BERT, Llama and XLM-RoBERTa, on the `tokenizers` library."""

from autopipeline.text.bert import BertTokenizer
from autopipeline.text.clip import CLIPTokenizer
from autopipeline.text.gemma import GemmaTokenizer
from autopipeline.text.llama import LlamaTokenizer
from autopipeline.text.t5 import T5Tokenizer
from autopipeline.text.xlm_roberta import XLMRobertaTokenizer

__all__ = ["BertTokenizer", "CLIPTokenizer", "GemmaTokenizer", "LlamaTokenizer", "T5Tokenizer", "XLMRobertaTokenizer"]
