# Instruction tuning: a pretrained model learns to answer from the 15,000 questions and answers of Dolly.
#   python data/dolly/prepare.py
#   python train.py config/finetune_dolly.py --init_from=gpt2
#   python sample.py --chat --out_dir=out-dolly
# To start from a model of your own, pack with its tokenizer and its block_size. The loss is computed only on
# answers.
#   python data/dolly/prepare.py --tokenizer out/ckpt.pt --block_size 256
#   python train.py config/finetune_dolly.py --init_from=out/ckpt.pt

out_dir = 'out-dolly'
dataset = 'dolly'
init_from = 'gpt2'  # sets n_layer, block_size and the rest of the model
auto_resume = True  # the same command resumes a run that was stopped
# otherwise, on a small set, the model learns answers from the conversation before them, not from the question
isolate_documents = True

# 2 rows x 5 micro-batches = 10 rows a step, with a few conversations each
batch_size = 2
gradient_accumulation_steps = 5
max_iters = 500

learning_rate = 3e-5
warmup_iters = 100
lr_decay_iters = 500
min_lr = 3e-6
weight_decay = 0.01

eval_interval = 50
eval_iters = 40
log_interval = 10
generate_interval = 50  # answer the same four questions, in samples.md
checkpoint_interval = 50
keep_last_n_checkpoints = 3
