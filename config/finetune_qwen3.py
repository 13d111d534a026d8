# Tune Qwen3-0.6B on dialogues, with its own tokenizer and chat template, by a LoRA adapter.
#   hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B
#   python -m corpus.conversations build --input dialogues.jsonl --out data/dialogues --tokenizer Qwen3-0.6B \
#       --style chatml --block_size 512
#   python train.py config/finetune_qwen3.py
#   python train.py config/finetune_qwen3.py --lora_rank=0 --learning_rate=1e-5 --min_lr=0    # all weights
#   python sample.py --chat --out_dir=out-qwen3
#   python sample.py --out_dir=out-qwen3 --export=exported          # the whole model
#   python sample.py --out_dir=out-qwen3 --export=adapter --adapter=True     # the adapter alone, for peft
# Qwen2.5 and SmolLM2 work in the same way.

out_dir = 'out-qwen3'
dataset = 'dialogues'
init_from = 'Qwen3-0.6B'
block_size = 512
isolate_documents = True

lora_rank = 16
lora_alpha = 32.0

batch_size = 4
gradient_accumulation_steps = 4
max_iters = 300
learning_rate = 2e-4
warmup_iters = 10
lr_decay_iters = 300
min_lr = 2e-5
weight_decay = 0.0

eval_interval = 50
eval_iters = 20
log_interval = 5
