"""Learning rates per group of parameters: lr_groups='mlp:1,attn:0.1,*:0' trains MLPs and, slower, attention.

    groups = LrGroups(model, 'mlp:1,attn:0.1,*:0')     # freezes what has factor 0, before optimizers are made
    configure_optimizers(model, settings, dtype, groups.factors)

A pattern is one part of a parameter's name or several, with * ? [] as in file names: attn, h.0, h.[0-5].mlp,
wte, *.bias. The first pattern that matches decides; a parameter that none matches has factor 1. A factor
multiplies the peak learning rate, and with it the weight decay of a step.
"""

from fnmatch import fnmatchcase

from configurator import nearest


class LrGroups:
    """The learning-rate factor of each parameter. It freezes parameters of factor 0: they get no gradient
    and no optimizer state.

    raises  ValueError for a setting that is malformed, matches no parameter, or freezes all
    """

    def __init__(self, model, lr_groups: str):
        self.factors, self.sizes = {}, {}  # by name; {pattern: [parameters in each tensor]}
        patterns = parse(lr_groups)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        is_adapter = len(parameters) < len(list(model.parameters()))
        for pattern in patterns:
            if not any(matches(name, pattern) for name in parameters):
                parts = {part for name in parameters for part in name.split('.')}
                near = nearest(pattern, sorted(parts | set(parameters)), ', did you mean {}?')
                raise ValueError(f'lr_groups={lr_groups}: no parameter is named {pattern}{near}: accepted '
                                 f'are names and parts of names, such as {", ".join(sorted(parts)[-8:])}')
        for name, p in parameters.items():
            pattern = next((each for each in patterns if matches(name, each)), 'others')
            self.factors[name] = patterns.get(pattern, 1.0)
            self.sizes.setdefault(pattern, []).append(p.numel())
        self.patterns = patterns
        frozen = [name for name, factor in self.factors.items() if factor == 0]
        if len(frozen) == len(parameters):
            raise ValueError(f'lr_groups={lr_groups} freezes every parameter: give one a factor above 0')
        if frozen and is_adapter:
            raise ValueError(f'lr_groups={lr_groups} freezes adapters: leave them out of --lora_targets')
        for name in frozen:
            parameters[name].requires_grad_(False)

    def describe(self) -> str:
        """Return a line with the factor and size of each group."""
        words = []
        for pattern, sizes in self.sizes.items():
            factor = self.patterns.get(pattern, 1.0)
            words.append(f'{pattern} {f"x {factor:g}" if factor else "frozen"}: '
                         f'{sum(sizes):,} parameters in {len(sizes)} tensors')
        return 'learning rates: ' + '; '.join(words)


def parse(lr_groups):
    """'mlp:1,*:0' -> {'mlp': 1.0, '*': 0.0}"""
    factors = {}
    for entry in filter(None, map(str.strip, lr_groups.split(','))):
        pattern, _, number = entry.rpartition(':')
        try:
            factors[pattern] = float(number)
        except ValueError:
            factors[pattern] = -1.0
        if not pattern or not 0 <= factors[pattern] < float('inf'):
            raise ValueError(f'lr_groups={lr_groups}: {entry!r} is no PATTERN:FACTOR, accepted are such as '
                             'mlp:1,attn:0.1,*:0, with factors of 0 or more')
    return factors


def matches(name, pattern):
    """Whether whole parts of a dotted name fit a pattern: h.1 fits transformer.h.1.mlp, not h.10."""
    return fnmatchcase(f'.{name}.', f'*.{pattern}.*')
