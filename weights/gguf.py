"""Models as GGUF files, for llama.cpp and the programs around it. The `gguf` package knows their names."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from files import write_atomically
from model import rotary_table
from tokens.tokenizer_json import BPE_PATTERN, byte_level, load_engine, tokenizer_config, vocabulary
from weights.architectures import architecture_of

TYPES = {torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16'}
GGML_ACTIVATIONS = {'gpt2': ('gelu_tanh', 'gelu'), 'llama': ('silu',)}  # ggml's GELU is a table in float16

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace('{1,3}', '')
SMOLLM = {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, byte_level()]}
# llama.cpp's names. It has none for BPE_PATTERN, which differs from GPT-2's in numbers of more than 3 digits,
# words of more than 32 letters, and Han characters after other letters or 16 of their kind
PRE_TOKENIZERS = [('gpt-2', byte_level()), ('gpt-2', byte_level(BPE_PATTERN)), ('smollm', SMOLLM),
                  ('llama-bpe', byte_level(LLAMA3_PATTERN)), ('qwen2', byte_level(QWEN2_PATTERN))]


def save(model, path: Path, tokenizer, template=None, quantize=None):
    """Write a model and its tokenizer to one file. ValueError for what llama.cpp cannot run.

    template  corpus.template.Template of the conversations that the model was tuned on
    quantize  'int8' = matrices as q8_0; None = in the model's dtype
    """
    import gguf
    if tokenizer is None:
        raise ValueError(f'{path}: a .gguf file holds a tokenizer, none was given')
    config = model.config
    if config.arch not in GGML_ACTIVATIONS:
        raise ValueError(f'arch={config.arch}: llama.cpp has no counterpart, train with --arch=llama')
    if config.activation not in GGML_ACTIVATIONS[config.arch]:
        accepted = ' and '.join(GGML_ACTIVATIONS[config.arch])
        raise ValueError(f'activation={config.activation}: llama.cpp has {accepted} there')
    architecture = architecture_of(config)
    kind = 'Q8_0' if quantize == 'int8' else TYPES[model.transformer.wte.weight.dtype]
    model_arch = gguf.MODEL_ARCH[architecture.model_type.upper().replace('MISTRAL', 'LLAMA')]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[model_arch])
    file_type = gguf.LlamaFileType['ALL_F32' if kind == 'F32' else f'MOSTLY_{kind}']
    settings = model_settings(config) | tokenizer_settings(tokenizer, template)
    settings |= dict(name=path.stem, file_type=file_type, quantization_version=gguf.GGML_QUANT_VERSION)
    for name, value in settings.items():
        if value is not None:
            getattr(writer, f'add_{name}')(value)

    # the types and shapes of all tensors come before the first tensor
    name_map, tensors = gguf.get_tensor_name_map(model_arch, config.n_layer), []
    for name, tensor in stored_tensors(model, architecture, tokenizer.vocab_size).items():
        name = name_map.get_name(name, try_suffixes=('.weight', '.bias')) or name
        stored_kind = kind
        if tensor.dim() == 1 or name == 'position_embd.weight':  # llama.cpp adds them in float32
            stored_kind = 'F32'
        elif kind == 'Q8_0' and tensor.shape[1] % 32:
            stored_kind = 'F16'
        stored_kind = gguf.GGMLQuantizationType[stored_kind]
        tensors.append((tensor, stored_kind))
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored_kind)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), stored_kind)

    def write(f):
        with contextlib.closing(writer):
            writer.write_header_to_file(Path(f.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, stored_kind in tensors:
                writer.write_tensor_data(gguf.quantize(tensor.float().cpu().numpy(), stored_kind))
    write_atomically(path, write)


def stored_tensors(model, architecture, n_tokens):
    """Return the tensors by transformers' names, without padding rows, matrices as outputs x inputs."""
    config, tensors = model.config, replace(architecture, transposed=()).weights_of(model, n_tokens)
    is_llama = architecture.model_type in ('llama', 'mistral')
    for name, tensor in tensors.items():
        if is_llama and name.endswith(('q_proj.weight', 'k_proj.weight')):
            # llama.cpp rotates neighbors: rows 0, D/2, 1, D/2 + 1 ... of each head
            heads = tensor.reshape(-1, 2, config.head_size // 2, config.n_embd)
            tensors[name] = heads.transpose(1, 2).reshape(tensor.shape)
    if config.rope_scaling:
        short = replace(config, block_size=2)
        angles = [rotary_table(each)[1][1].asin() for each in (replace(short, rope_scaling=None), short)]
        tensors['rope_freqs.weight'] = (angles[0] / angles[1])[0, config.head_size // 2:]
    return tensors


def model_settings(c):
    """Return {method of GGUFWriter without add_: value}."""
    settings = dict(context_length=c.block_size, block_count=c.n_layer, embedding_length=c.n_embd,
                    feed_forward_length=c.n_hidden, head_count=c.n_head, head_count_kv=c.n_kv_head)
    if c.arch == 'gpt2':
        return dict(settings, layer_norm_eps=c.norm_eps)
    return dict(settings, layer_norm_rms_eps=c.norm_eps, rope_freq_base=c.rope_theta, key_length=c.head_size,
                value_length=c.head_size, rope_dimension_count=c.head_size)


def tokenizer_settings(tokenizer, template):
    from gguf import TokenType
    content = tokenizer.tokenizer_json()
    ids, merges = vocabulary(content), content['model'].get('merges')
    chat_template = tokenizer_config(tokenizer).get('chat_template')
    if template:
        chat_template = template.jinja()
    cuts = str(content['pre_tokenizer']).replace("'trim_offsets': False", "'trim_offsets': True")
    names = [name for name, step in PRE_TOKENIZERS if str(step) == cuts]
    if not names or not merges or content['normalizer'] not in (None, {'type': 'NFC'}):
        raise ValueError(f'llama.cpp cannot cut a text as this {tokenizer.kind} tokenizer does: accepted are '
                         'those of corpus.train_tokenizer, GPT-2, SmolLM, Llama 3 and Qwen; for others try '
                         'its convert_hf_to_gguf.py on an --export=FOLDER')
    types = dict.fromkeys(sorted(ids, key=ids.get), TokenType.NORMAL)
    for token in content['added_tokens']:
        types[token['content']] = TokenType.CONTROL if token['special'] else TokenType.USER_DEFINED
    return dict(
        tokenizer_model='gpt2', tokenizer_pre=names[0],
        vocab_size=len(ids), token_list=list(types), token_types=list(types.values()),
        token_merges=[pair if isinstance(pair, str) else ' '.join(pair) for pair in merges],
        bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eot, pad_token_id=tokenizer.pad,
        add_bos_token=tokenizer.bos in load_engine(content).encode('').ids,
        eot_token_id=template and template.end_id,  # ends a turn
        chat_template=chat_template)
