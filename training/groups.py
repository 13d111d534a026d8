"""Learning rates per group of parameters: lr_groups='mlp:1,attn:0.1,*:0' trains MLPs and, slower, attention.

A pattern is one part of a parameter's name or several, with * ? [] as in file names. The first pattern that
matches decides; a parameter that none matches has factor 1.
"""

from fnmatch import fnmatchcase

from configurator import nearest
from weights.lora import is_adapter


class LrGroups:
    """The learning-rate factor of each parameter. One of factor 0 gets no gradient and no optimizer state.

    raises  ValueError for a setting that is malformed, matches no parameter, or freezes all
    """

    def __init__(self, model, lr_groups: str):
        self.patterns = parse(lr_groups)
        self.factors, self.sizes = {}, {}  # by name; {pattern: [parameters in each tensor]}
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for pattern in self.patterns:
            if not any(matches(name, pattern) for name in parameters):
                parts = {part for name in parameters for part in name.split('.')}
                near = nearest(pattern, sorted(parts | set(parameters)), ', did you mean {}?')
                raise ValueError(f'lr_groups={lr_groups}: no parameter is named {pattern}{near}: accepted '
                                 f'are names and parts of names, such as {", ".join(sorted(parts)[-8:])}')
        for name, p in parameters.items():
            pattern = next((each for each in self.patterns if matches(name, each)), 'others')
            self.factors[name] = self.patterns.get(pattern, 1.0)
            self.sizes.setdefault(pattern, []).append(p.numel())
            p.requires_grad_(self.factors[name] > 0)
        if not any(self.factors.values()):
            raise ValueError(f'lr_groups={lr_groups} freezes every parameter: give one a factor above 0')
        if is_adapter(model) and not all(self.factors.values()):
            raise ValueError(f'lr_groups={lr_groups} freezes adapters: leave them out of --lora_targets')

    def describe(self) -> str:
        """Return a line with the factor and size of each group."""
        words = []
        for pattern, sizes in self.sizes.items():
            effect = 'frozen'
            if factor := self.patterns.get(pattern, 1.0):
                effect = f'x {factor:g}'
            words.append(f'{pattern} {effect}: {sum(sizes):,} parameters in {len(sizes)} tensors')
        return 'learning rates: ' + '; '.join(words)


def parse(lr_groups):
    """'mlp:1,*:0' -> {'mlp': 1.0, '*': 0.0}"""
    factors = {}
    for entry in filter(None, map(str.strip, lr_groups.split(','))):
        pattern, _, number = entry.rpartition(':')
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not pattern or not 0 <= factor < float('inf'):
            raise ValueError(f'lr_groups={lr_groups}: {entry!r} is no PATTERN:FACTOR, accepted are such as '
                             'mlp:1,attn:0.1,*:0, with factors of 0 or more')
        factors.setdefault(pattern, factor)  # the first decides
    return factors


def matches(name, pattern):
    """Whether whole parts of a dotted name fit a pattern: h.1 fits transformer.h.1.mlp, not h.10."""
    return fnmatchcase(f'.{name}.', f'*.{pattern}.*')
