"""The model card of an exported model: README.md in its folder."""

from pathlib import Path

# settings of train.py that describe a run
SETTINGS = ('init_from', 'dataset', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'max_iters',
            'optimizer', 'learning_rate', 'matrix_lr', 'weight_decay', 'dropout', 'lora_rank', 'seed')
TAGS = 'tags: [flatgpt]'  # tells a card from a README.md that somebody wrote
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [flatgpt]
---

# {name}

A language model of {parameters:,} parameters for up to {block_size:,} tokens, exported by flatGPT.
{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('{name}')
model = AutoModelForCausalLM.from_pretrained('{name}')
{prompt}
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))
```

In flatGPT: `python sample.py --init_from={name}{chat}`
"""
PLAIN = "ids = tokenizer('The', return_tensors='pt').input_ids"
CHAT = """\
messages = [{'role': 'user', 'content': 'Hello'}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt').input_ids"""


def model_card(trained, model, name: str) -> str:
    """Return the text of a model card. trained: its weights.begin.Start; name: of its folder."""
    facts, prompt, chat, best = [], PLAIN, '', trained.progress.best_val_loss
    if trained.progress.iter_num:
        facts.append(f'- updates: {trained.progress.iter_num:,}')
    if 0 < best < float('inf'):
        facts.append(f'- best validation loss: {best:.4f} nats per token')
    if trained.style:
        prompt, chat = CHAT, ' --chat'
        facts.append(f'- tuned on conversations in the style `{trained.style}`, which is its chat template')
    for setting in SETTINGS:
        value = trained.settings.get(setting)
        if value not in (None, '', 0, 'scratch'):
            value = ','.join(Path(part).name for part in str(value).split(','))  # no folders of this machine
            facts.append(f'- {setting}: `{value}`')
    return CARD.format(name=name, parameters=model.get_num_params(False), block_size=model.config.block_size,
                       facts='\n'.join(['', *facts]), prompt=prompt, chat=chat)
