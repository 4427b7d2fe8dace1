"""Tiny random models of several architectures, and a small vocabulary for them: the test bench of the numerics."""
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForMaskedLM, BertConfig, DistilBertConfig, ModernBertConfig, PreTrainedTokenizerFast, RobertaConfig

SENTENCES = [
    "The drummers lost the beat because they were watching the crowd.", "The baker was late because he missed the bus.",
    "Anna said that she was tired.", "The kettle whistled until it was empty.", "When the twins arrived, they were hungry.",
    "The pilot checked the engine before he took off.", "My sister forgot that she had the keys.", "The dogs barked because they were cold.",
]


@lru_cache
def tokenizer(vocabulary: int = 160) -> PreTrainedTokenizerFast:
    "A cased WordPiece tokenizer trained on the sentences above (some words fall into several pieces)."
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(SENTENCES + ["he she it they He She It They"] * 20, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", model_max_length=64)


@lru_cache
def byte_level_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer with a mask token, as RoBERTa has: the space belongs to the following word."
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", cls_token="<s>", sep_token="</s>", eos_token="</s>", mask_token="<mask>", model_max_length=64)


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "bert": lambda v: BertConfig(vocab_size=v, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SMALL),
    "roberta": lambda v: RobertaConfig(vocab_size=v, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, **_SMALL),
    "distilbert": lambda v: DistilBertConfig(vocab_size=v, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64),
    "modernbert": lambda v: ModernBertConfig(vocab_size=v, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, **_SMALL),
}


def masked_model(kind: str = "bert", *, dtype: torch.dtype = torch.float64, seed: int = 0):
    "A random masked language model of the named architecture and its tokenizer, in evaluation mode."
    words = byte_level_tokenizer() if kind == "roberta" else tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(CONFIGS[kind](len(words)))
        for p in model.parameters():  # the usual 0.02 makes nearly linear models; larger weights test harder
            torch.nn.init.normal_(p, std=0.3)
    return words, model.to(dtype).eval()
