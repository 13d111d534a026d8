# A GPT of GPT-2's size in the modern architecture, on FineWeb, with Muon.
#   python data/fineweb/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py
# Any number of GPUs that divides 512 windows takes the same steps.
#
# The recipe is that of https://github.com/KellerJordan/modded-nanogpt/pull/323, whose ten runs end at a
# validation loss of 3.279 on average after the same 3250 steps (1.70B tokens). llm.c's plain recipe takes
# 10.3B tokens to 3.28. Both were measured by their authors, on their validation split and on a model that
# also has biases and gains. This file has not been run to its end yet.

out_dir = 'out-gpt2-modern'
dataset = 'fineweb'
wandb_log = False
wandb_run_name = 'gpt2-modern'

arch = 'modern'
n_layer = 12
n_head = 6  # heads are 128 wide
n_embd = 768
block_size = 1024

# 16 windows x 1024 tokens x 32 micro-batches = 524,288 tokens a step
batch_size = 16
gradient_accumulation_steps = 32
max_iters = 3250

optimizer = 'muon'
matrix_lr = 0.025
weight_decay = 0.05  # only for the matrices of Muon
embedding_lr = 0.7
head_lr = 0.004
learning_rate = 0.004  # for the remaining parameters: none in this architecture
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0  # off

lr_schedule = 'wsd'
warmup_iters = 0
decay_fraction = 0.7  # constant, then linear to zero over the last 70%
min_lr = 0.0

eval_interval = 250
eval_iters = 160  # 2.6M tokens
log_interval = 10
