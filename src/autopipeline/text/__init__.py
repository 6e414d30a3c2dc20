"""CLIP's, T5's, Gemma's, BERT's, Llama's, ChatGLM's and XLM-RoBERTa's tokenizers, on the `tokenizers` library."""

from autopipeline.text.bert import BertTokenizer
from autopipeline.text.chatglm import ChatGLMTokenizer
from autopipeline.text.clip import CLIPTokenizer
from autopipeline.text.gemma import GemmaTokenizer
from autopipeline.text.llama import LlamaTokenizer
from autopipeline.text.t5 import T5Tokenizer
from autopipeline.text.xlm_roberta import XLMRobertaTokenizer

__all__ = [
    "BertTokenizer",
    "CLIPTokenizer",
    "ChatGLMTokenizer",
    "GemmaTokenizer",
    "LlamaTokenizer",
    "T5Tokenizer",
    "XLMRobertaTokenizer",
]
