# Finetune gpt2-xl on Shakespeare for a few steps, with nanoGPT's settings. For another size: --init_from=gpt2
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py
#   python sample.py --out_dir=out-shakespeare

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-shakespeare'

dataset = 'shakespeare'
init_from = 'gpt2-xl'  # the largest GPT-2
always_save_checkpoint = False  # the best checkpoint is the result

# 1 window x 32 micro-batches x 1024 = 32,768 tokens a step; 9 steps are about an epoch of 301,966 tokens
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
