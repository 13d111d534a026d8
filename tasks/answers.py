"""The answers of a tuned model to a file of questions, compared with those that the file has."""

from collections import defaultdict
from dataclasses import replace

from chat import json_line, stop_ids
from corpus.dialogue import read_conversations
from files import write_atomically
from serving.engine import Engine, Sequence


def read_questions(path):
    """Return [(turns up to the question, expected answer or '')]."""
    questions = []
    for where, turns, _ in read_conversations([path]):
        answer = ''
        if turns and turns[-1][0] == 'assistant':
            answer = turns.pop()[1]
        if not turns:
            raise ValueError(f'{where}: there is no question')
        questions.append((turns, answer))
    if not questions:
        raise ValueError(f'{path}: there is no question')
    return questions


def answer_questions(answerer, questions, batch_size):
    """Return the answer to each question."""
    from tqdm import tqdm
    prompts = [answerer.fit(turns) for turns, _ in questions]
    if n_cut := sum(prompt.n_left_out > 0 or prompt.n_cut > 0 for prompt in prompts):
        print(f'{n_cut:,} of {len(prompts):,} questions are too long for the context of '
              f'{answerer.model.config.block_size} tokens: their beginnings are cut off')
    tokenizer, ends = answerer.tokenizer, stop_ids(answerer.tokenizer)
    engine = Engine(answerer.model, tokenizer, min(batch_size, len(prompts)), len(prompts))
    with tqdm(total=len(prompts), unit=' answers', disable=None) as bar:
        sequences = []
        for i, prompt in enumerate(prompts):
            ids = prompt.ids.tolist()
            sampling = answerer.sampling_after(ids)
            sampling = replace(sampling, seed=(sampling.seed + i) % 2**63)  # numbers of its own
            sequences.append(Sequence(ids, sampling, tokenizer, stop=[], stop_ids=ends,
                                      is_over=sampling.max_new_tokens == 0,
                                      emit=lambda piece: bar.update(piece.finish_reason is not None)))
        engine.submit(sorted(sequences, key=lambda sequence: len(sequence.ids)))  # for little padding
        engine.run()
    replies = [[token.id for token in sequence.tokens] for sequence in sequences]
    return [tokenizer.decode(reply).strip() for reply in replies]


def write_answers(path, questions, replies):
    """Write a line of JSON for each question, and print how many answers are as expected."""
    expected = defaultdict(set)  # one question may have several answers in the file
    for turns, answer in questions:
        if answer:
            expected[str(turns)].add(answer)
    lines, is_exact = [], []
    for (turns, _), reply in zip(questions, replies, strict=True):
        texts = [text for role, text in turns[-2:] if role in ('user', 'context')]
        line = {'question': '\n\n'.join(texts), 'answer': reply}
        if accepted := sorted(expected[str(turns)]):
            is_exact.append(reply in accepted)
            line |= dict(expected=accepted, exact=is_exact[-1])
        lines.append(json_line(line))
    write_atomically(path, lambda f: f.writelines(lines))
    share = ''
    if is_exact:
        n, n_exact = len(is_exact), sum(is_exact)
        share = f', {n_exact:,} of {n:,} ({n_exact / n:.1%}) exactly as expected'
    print(f'{path}: {len(lines):,} answers{share}')
