# GPT-2 (124M) on OpenWebText with nanoGPT's settings. nanoGPT reports a loss of about 2.85 after about 4 days
# on eight A100 40GB.
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# Any number of GPUs that divides 480 windows takes the same steps.

wandb_log = False  # True in nanoGPT's file
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 windows x 1024 tokens x 40 micro-batches = 491,520 tokens a step; 600,000 steps see 295B
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
