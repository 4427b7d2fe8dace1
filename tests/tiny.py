"""Tiny random models of several architectures, and a small vocabulary for them: the test bench of the numerics."""
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

SENTENCES = [
    "The drummers lost the beat because they were watching the crowd.", "The baker was late because he missed the bus.",
    "Anna said that she was tired.", "The kettle whistled until it was empty.", "When the twins arrived, they were hungry.",
    "The pilot checked the engine before he took off.", "My sister forgot that she had the keys.", "The dogs barked because they were cold.",
]

MORE = SENTENCES + ["he she it they He She It They"] * 20 + ["Unhappiness and sadness, they said: was Jack's box of quartz glass for him?"] * 5


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


@lru_cache
def gpt_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    "A byte-level BPE tokenizer as GPT-2 and Qwen have it: no special token is added, and there is neither a mask nor a padding token."
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=64)


@lru_cache
def llama_tokenizer(vocabulary: int = 220) -> PreTrainedTokenizerFast:
    "A SentencePiece-like BPE tokenizer: spaces become a visible mark, the text gets one in front, and a start token is added. No padding token."
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(MORE, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64)


@lru_cache
def gemma_tokenizer(vocabulary: int = 220) -> PreTrainedTokenizerFast:
    "A SentencePiece-like BPE tokenizer that puts no mark in front of the text, has a start and a padding token, and pads on the left."
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    core.decoder = decoders.Replace("\u2581", " ")
    core.train_from_iterator(MORE, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"], show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left", model_max_length=64)


@lru_cache
def t5_tokenizer(vocabulary: int = 220) -> PreTrainedTokenizerFast:
    "A unigram tokenizer as T5 has it: an end token is added, and ten sentinels stand for hidden pieces of a text."
    sentinels = [f"<extra_id_{i}>" for i in range(10)]
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(MORE, trainers.UnigramTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>", *sentinels], unk_token="<unk>", show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=sentinels, model_max_length=64)


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_LLAMA = {"max_position_embeddings": 64, "num_key_value_heads": 1, "pad_token_id": None, "tie_word_embeddings": False, **_SMALL}
CONFIGS = {  # masked language models
    "bert": lambda v: BertConfig(vocab_size=v, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SMALL),
    "roberta": lambda v: RobertaConfig(vocab_size=v, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, **_SMALL),
    "distilbert": lambda v: DistilBertConfig(vocab_size=v, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=64),
    "modernbert": lambda v: ModernBertConfig(vocab_size=v, max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3, **_SMALL),
}
CAUSAL = {
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_positions=64, n_embd=16, n_layer=2, n_head=2, n_inner=24, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": lambda v: LlamaConfig(vocab_size=v, bos_token_id=1, eos_token_id=2, **_LLAMA),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, bos_token_id=0, eos_token_id=0, **{**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, bos_token_id=0, eos_token_id=0, head_dim=8, **_LLAMA),
    "gemma": lambda v: GemmaConfig(vocab_size=v, head_dim=8, **{**_LLAMA, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "tie_word_embeddings": True}),
}
SEQ2SEQ = {
    "t5": lambda v: T5Config(vocab_size=v, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0),
}
# Models with habits of their own; each is a test for one of them
ODD = {
    "opt": (AutoModelForCausalLM, lambda v: OPTConfig(vocab_size=v, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0, pad_token_id=0, bos_token_id=0, eos_token_id=0)),
    "bart": (AutoModelForCausalLM, lambda v: BartConfig(vocab_size=v, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=24, encoder_ffn_dim=24, max_position_embeddings=64, dropout=0.0,
                                                     pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=0)),  # their head reads the decoder inside the backbone
    "deberta": (AutoModelForMaskedLM, lambda v: DebertaV2Config(vocab_size=v, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, **_SMALL)),  # repeats an output of one row by itself
}
TOKENIZERS = {"opt": gpt_tokenizer, "bart": gpt_tokenizer, "roberta": byte_level_tokenizer, "gpt2": gpt_tokenizer, "qwen2": gpt_tokenizer, "qwen3": gpt_tokenizer, "llama": llama_tokenizer, "gemma": gemma_tokenizer, "t5": t5_tokenizer}
ARCHITECTURES = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "qwen3", "gemma", "t5")  # qwen2 can be had too
# These compute their norms or rotary embeddings in float32 whatever the model's dtype, so they agree to float32 precision only
FLOAT32_INSIDE = ("modernbert", "llama", "qwen2", "qwen3", "gemma", "t5")


def tiny_model(kind: str = "bert", *, dtype: torch.dtype = torch.float64, seed: int = 0):
    "A random language model of the named architecture and its tokenizer, in evaluation mode."
    words = TOKENIZERS.get(kind, tokenizer)()
    auto = ODD[kind][0] if kind in ODD else AutoModelForMaskedLM if kind in CONFIGS else AutoModelForCausalLM if kind in CAUSAL else AutoModelForSeq2SeqLM
    config = ODD[kind][1] if kind in ODD else {**CONFIGS, **CAUSAL, **SEQ2SEQ}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config(len(words)))
        for p in model.parameters():  # the usual 0.02 makes nearly linear models; larger weights test harder
            torch.nn.init.normal_(p, std=0.3)
    return words, model.to(dtype).eval()


def masked_model(kind: str = "bert", *, dtype: torch.dtype = torch.float64, seed: int = 0):
    "A random masked language model of the named architecture and its tokenizer, in evaluation mode."
    assert kind in CONFIGS, f"{kind} is not a masked language model"
    return tiny_model(kind, dtype=dtype, seed=seed)
