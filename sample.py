"""Writes on from a prompt with a trained model, talks with one that was tuned on conversations, or answers a file of questions.
Settings are the names below, see --help.

    python sample.py --out_dir=out-quickstart
    python sample.py --out_dir=out-quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=200 --temperature=0.8 --top_k=200
    python sample.py --out_dir=out-quickstart --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?" --num_samples=5 --max_new_tokens=100
    python sample.py --out_dir=out-quickstart --export=exported      # for transformers; or --export=weights.npz, for NumPy
    python sample.py --out_dir=out-dolly --chat
    python sample.py --out_dir=out-dolly --prompts=questions.jsonl --answers=answers.jsonl --temperature=0

All samples are drawn in one batch, the first is shown as it is drawn, and each ends where the model ends its document.

--chat reads a line, answers, and keeps both in mind as far as the context goes. /reset forgets them, /save FILE adds the conversation to
a JSONL file that corpus/conversations.py reads, /quit or the end of input ends, Ctrl-C stops an answer.
"""

import codecs
import contextlib
import json
import sys
from pathlib import Path
from typing import Literal

import torch

import distributed
import files
from configurator import configure
from corpus.dialogue import read_conversations
from corpus.readers import read_text
from corpus.template import ROLE_TOKENS, STYLES, check_tokenizer, encode
from files import one_line_errors
from tokens.tokenizer import load_tokenizer, opening
from weights.begin import build_model, find_start

# -----------------------------------------------------------------------------
# what to sample from
init_from = 'resume'  # out_dir's checkpoint; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in transformers' format, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the one in out_dir; may be another trainer's
n_head: int | None = None  # of a checkpoint_path that does not say it
strict = True  # False: checkpoint_path may lack weights or have others, which are listed
export = ''  # write the model to this folder for transformers, or to this .npz file, and sample nothing
# what to write
start = '\n'  # the prompt, or FILE:prompt.txt; may hold <|endoftext|>
num_samples = 10
max_new_tokens = 500
# questions instead
chat = False  # read them line by line, and answer each
prompts = ''  # a file of them, in a layout that corpus/conversations.py reads; answers that it holds are compared with the model's
answers = ''  # the JSONL file for the answers to prompts
batch_size = 16  # prompts answered at a time
style: Literal['auto', 'chat', 'alpaca'] = 'auto'  # prompt template; auto = the one that the model was tuned with
# how to draw
temperature = 0.8  # below 1 is more careful, above 1 more daring, 0 always takes the most likely token
top_k: int | None = 200  # draw among so many most likely tokens; 0 or None = all
top_p: float | None = None  # draw among the fewest tokens that hold this probability; None = all
seed = 1337
# system
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # auto = eager: it pays for long batches only
quantize: Literal['none', 'int8'] = 'none'  # int8 = a byte a weight, on the CPU: a single sample comes faster, 10 do not
# -----------------------------------------------------------------------------


def main():
    check_settings()
    place = distributed.start(device).device
    precision = torch.float32 if export and dtype == 'auto' else distributed.choose_dtype(dtype, place)  # exported as it was trained
    start = find_start(init_from, out_dir, checkpoint_path, n_head)
    tokenizer = load_tokenizer(find_tokenizer(state, path))
    # before the model is built: a wrong prompt shows at once
    template = find_style(state, path, tokenizer) if chat or prompts else None
    questions = read_questions() if prompts else None
    prompt = None if template else read_prompt(tokenizer)
    model = build_model(state, path, tokenizer, precision, strict).to(place, precision)
    if export:
        return write_export(model, tokenizer)
    if compile is True and distributed.choose_compile(True, place):
        model.compile_blocks()
    else:
        model.pack(None if quantize == 'none' else quantize)

    torch.manual_seed(seed)
    if template:
        return answer_all(model, tokenizer, template, questions) if prompts else talk(model, tokenizer, template)
    rows = torch.tensor(prompt, device=place).repeat(num_samples, 1)  # (num_samples, T)
    drawn = model.stream(rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=tokenizer.vocab_size)
    for text in write_out(drawn, tokenizer, start_text(tokenizer, prompt)):
        print(text, end='', flush=True)


def write_export(model, tokenizer):
    for file in model.save_pretrained(export, tokenizer):
        print(f'{file}: {file.stat().st_size:,} bytes')
    if export.endswith('.npz'):
        print(f"read it with numpy.load('{export}'), or here with --init_from={export}")
    else:
        print(f"read it with AutoModelForCausalLM.from_pretrained('{export}') and AutoTokenizer.from_pretrained('{export}'), or here with --init_from={export}")


def write_out(drawn, tokenizer, prompt):
    """Yields the text to print: the first sample piece by piece as it is drawn, then the others, with nanoGPT's rule after each."""
    rows = [[] for _ in range(num_samples)]
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may come in several tokens
    yield prompt
    for tokens in until_end(drawn, {tokenizer.eot}, [max_new_tokens] * num_samples):
        for row, token in zip(rows, tokens):
            if token is not None:
                row.append(token)
        if tokens[0] is not None:
            yield decoder.decode(tokenizer.decode_bytes(tokens[:1]))
    yield decoder.decode(b'', final=True) + '\n---------------\n'
    for row in rows[1:]:
        yield prompt + tokenizer.decode(row) + '\n---------------\n'


def until_end(drawn, stops, most):
    """Yields the tokens of all rows, step by step, with None for a row that has ended: at a token of stops, or after most[row] tokens."""
    ended = [False] * len(most)
    for n, ids in enumerate(drawn):
        tokens = ids.tolist()
        ended = [done or token in stops or n >= limit for done, token, limit in zip(ended, tokens, most)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, tokens)]


# -----------------------------------------------------------------------------
# questions


def find_style(state, path, tokenizer):
    """The template of the conversations that the model was tuned on, or the one given."""
    check_tokenizer(tokenizer)
    known = (state or {}).get('style') if style == 'auto' else style
    if known not in STYLES:
        raise ValueError(f'{path} was not tuned on conversations: tune it with python train.py config/finetune_dolly.py --init_from={path}, '
                         'or name the template it should be asked in, --style=chat or --style=alpaca')
    return known


def prompt_of(turns, tokenizer, template, block_size):
    """(ids, turns left out, tokens cut) of the prompt for an answer, which is left a quarter of the context if it may be that long."""
    fitted = encode(turns, tokenizer, template, block_size - min(max_new_tokens, max(1, block_size // 4)))
    if fitted is None:
        raise ValueError(f'a context of {block_size} tokens has no room for a prompt in style {template}')
    ids, _, n_left_out, n_cut, _ = fitted
    return ids.tolist(), n_left_out, n_cut


def draw_answers(model, prompts, tokenizer):
    """Yields the tokens of the answers to prompts (lists of ids), step by step, with None for an answer that has ended.

    Shorter prompts are padded on the left, with what nothing attends to, so that each is answered as if it were alone.
    """
    T, device = max(map(len, prompts)), next(model.parameters()).device
    idx = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts], device=device)  # (B, T)
    documents = None
    if min(map(len, prompts)) < T:
        documents = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    most = [min(max_new_tokens, model.config.block_size - len(prompt)) for prompt in prompts]
    stops = {tokenizer.eot, *(tokenizer.special[name] for name in ROLE_TOKENS.values() if name in tokenizer.special)}
    drawn = model.stream(idx, max(most), temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=tokenizer.vocab_size, documents=documents)
    return until_end(drawn, stops, most)


def read_questions():
    """[(turns up to the question, answer in the file or '')] of the conversations in the file prompts."""
    found = []
    for where, turns, _ in read_conversations([prompts]):
        answer = turns[-1][1] if turns and turns[-1][0] == 'assistant' else ''
        turns = turns[:-1] if turns and turns[-1][0] == 'assistant' else turns
        if not turns:
            raise ValueError(f'{where}: there is no question')
        found.append((turns, answer))
    if not found:
        raise ValueError(f'{prompts}: there is no question')
    return found


def answer_all(model, tokenizer, template, questions):
    """Writes the file answers: the questions in their order, with what the model answers, and whether that is an answer in the file."""
    from tqdm import tqdm
    asked, n_left_out, n_cut = zip(*(prompt_of(turns, tokenizer, template, model.config.block_size) for turns, _ in questions))
    if n := sum(map(any, zip(n_left_out, n_cut))):
        print(f'{n:,} of {len(asked):,} questions are too long for the context of {model.config.block_size} tokens: their beginnings are cut off')
    replies = [[] for _ in asked]
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i]))  # little padding
    with tqdm(total=len(asked), unit=' answers', disable=None) as bar:
        for start in range(0, len(asked), batch_size):
            batch = by_length[start:start + batch_size]
            for tokens in draw_answers(model, [asked[i] for i in batch], tokenizer):
                for i, token in zip(batch, tokens):
                    if token is not None:
                        replies[i].append(token)
            bar.update(len(batch))
    expected = {}
    for turns, answer in questions:
        expected.setdefault(str(turns), set()).update([answer] if answer else [])
    lines, n_exact, n_known = [], 0, 0
    for (turns, _), reply in zip(questions, replies):
        known, answer = sorted(expected[str(turns)]), tokenizer.decode(reply).strip()
        line = {'question': '\n\n'.join(text for role, text in turns[-2:] if role in ('user', 'context')), 'answer': answer}
        lines.append({**line, 'expected': known, 'exact': answer in known} if known else line)
        n_known, n_exact = n_known + bool(known), n_exact + (answer in known)
    text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
    files.write_atomically(answers, lambda f: f.write(text.encode('utf-8')))
    print(f'{answers}: {len(lines):,} answers' + (f', {n_exact:,} of {n_known:,} ({n_exact / n_known:.1%}) exactly as {prompts} has them' if n_known else ''))


def talk(model, tokenizer, template):
    """Answers what is typed, or what comes through a pipe, line by line; all but the answers, and the lines about the model before them, goes to stderr."""
    turns, told, block_size = [], set(), model.config.block_size
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, arrow keys in input()
        print('/reset forgets, /save FILE keeps the conversation, /quit ends, Ctrl-C stops an answer', file=sys.stderr)
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(encoding='utf-8', errors='replace')
    while True:
        try:
            text = input('> ' if sys.stdin.isatty() else '').strip()
        except KeyboardInterrupt:
            print('\n/quit ends', file=sys.stderr)
            continue
        except EOFError:
            break
        command, _, argument = text.partition(' ')
        if command == '/quit':
            break
        if command == '/reset':
            turns, told = [], set()
        elif command == '/save':
            save_conversation(turns, Path(argument.strip() or 'chat.jsonl'))
        elif command.startswith('/'):
            print(f'{command} is none of /reset, /save FILE, /quit', file=sys.stderr)
        elif text:
            turns.append(('user', text))
            ids, n_left_out, n_cut = prompt_of(turns, tokenizer, template, block_size)
            for n, what in ((n_left_out, f'the oldest turns no longer fit into the context of {block_size} tokens, and are left out'),
                            (n_cut, f'this is too long for the context of {block_size} tokens: its beginning is cut off')):
                if n and what not in told:
                    print(f'({what})', file=sys.stderr)
                    told.add(what)
            turns.append(('assistant', answer_aloud(model, ids, tokenizer)))


def answer_aloud(model, ids, tokenizer):
    """Prints the answer to one prompt as it is drawn, and returns it; Ctrl-C ends it where it is."""
    decoder, answer = codecs.getincrementaldecoder('utf-8')(errors='replace'), ''
    try:
        for tokens in draw_answers(model, [ids], tokenizer):
            piece = decoder.decode(tokenizer.decode_bytes(tokens))
            answer += piece
            print(piece, end='', flush=True)
    except KeyboardInterrupt:
        print(' [stopped]', end='')
    print(flush=True)
    return answer.strip()


def save_conversation(turns, path):
    """Adds the conversation to a JSONL file; a file that cannot be written must not end it."""
    try:
        before = path.read_bytes() if path.exists() else b''
        before += b'' if before.endswith(b'\n') or not before else b'\n'
        line = json.dumps({'messages': [{'role': role, 'content': text} for role, text in turns]}, ensure_ascii=False) + '\n'
        files.write_atomically(path, lambda f: f.write(before + line.encode('utf-8')))
        print(f'{path}: turns: {len(turns)}', file=sys.stderr)
    except OSError as error:
        print(f'{path}: {error.strerror}', file=sys.stderr)


# -----------------------------------------------------------------------------


def check_settings():
    if bool(prompts) != bool(answers) or (chat and prompts):
        raise ValueError('--prompts=FILE and --answers=FILE go together, and without --chat')
    if answers and (Path(answers).is_dir() or not Path(answers).parent.is_dir()):
        raise ValueError(f'--answers={answers}: accepted is a file in a folder that is there')
    if compile is True and quantize != 'none':
        raise ValueError(f'--compile=True and --quantize={quantize} do not go together: leave one of them out')
    for name, fits, accepted in (('num_samples', num_samples >= 1, '1 or more'), ('max_new_tokens', max_new_tokens >= 0, '0 or more'),
                                 ('batch_size', batch_size >= 1, '1 or more'),
                                 ('temperature', temperature >= 0, '0 (greedy) or more'), ('top_k', (top_k or 0) >= 0, '0 or more, or None'),
                                 ('top_p', top_p is None or 0 < top_p <= 1, 'above 0 up to 1, or None'),
                                 ('seed', 0 <= seed < 2**63, '0 or more, below 2**63')):
        if not fits:
            raise ValueError(f'--{name}={globals()[name]}: accepted is {accepted}')


def read_prompt(tokenizer):
    text = read_text(start[len('FILE:'):]) if start.startswith('FILE:') else start
    return tokenizer.encode(text, allowed_special={'<|endoftext|>'}) if text else opening(tokenizer)


def start_text(tokenizer, prompt):
    return tokenizer.decode([i for i in prompt if i != tokenizer.eot])


if __name__ == '__main__':
    with one_line_errors():
        configure(globals())
        main()
