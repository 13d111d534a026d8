"""Read the articles of a MediaWiki dump as plain text. mwparserfromhell parses the wikitext."""

import re
import xml.etree.ElementTree as ET
from typing import NamedTuple

HIDDEN_LINKS = {'file', 'image', 'media', 'category', '文件', '檔案', '档案', '图像', '圖像', '分类', '分類'}
HIDDEN_TAGS = {'table', 'ref', 'references', 'gallery', 'math', 'chem', 'timeline', 'style', 'templatestyles',
               'syntaxhighlight', 'mapframe'}
LINE_TAGS = ('br', 'hr', 'p', 'div')
REDIRECTION = re.compile(r'\s*#\s*(redirect|重定向|重新導向)', re.IGNORECASE)
HEADING_MARK = '\x02'  # followed by the level of the heading that the rest of the line holds


class Page(NamedTuple):
    """An article. hidden names the dump's own namespaces of files and categories."""
    title: str
    wikitext: str
    hidden: frozenset


def read_pages(file, path):
    """Yield every Page of the main namespace that is not a redirection."""
    import mwparserfromhell  # noqa: F401 (says before the first page that it is missing)
    hidden = set()
    events = ET.iterparse(file, events=('start', 'end'))
    try:
        _, root = next(events)
        tag = local_name(root)
        if tag != 'mediawiki':
            raise ValueError(f'{path}: its first element is <{tag}>, not the <mediawiki> of a MediaWiki dump')
        for event, element in events:
            tag = local_name(element)
            if event == 'end' and tag == 'namespace' and element.get('key') in ('6', '14'):
                hidden.add((element.text or '').lower())
            if event == 'end' and tag == 'page':
                page = article(element, frozenset(hidden))
                if page is not None:
                    yield page
                root.clear()  # the parser keeps every element it has seen
    except ET.ParseError as error:
        reason = error.msg.partition(':')[0]
        raise ValueError(f'{path}, line {error.position[0]}: not XML, or cut short: {reason}') from None


def local_name(element):
    return element.tag.rpartition('}')[2]


def article(element, hidden):
    """The Page of a <page>; None for a redirection, another namespace, or a page that is not wikitext."""
    values = {local_name(child): child.text or '' for child in element.iter()}
    if values.get('ns', '0') != '0' or 'redirect' in values or values.get('model', 'wikitext') != 'wikitext':
        return None
    return Page(values.get('title', ''), values.get('text', ''), hidden)


def plain_text(wikitext: str, hidden=frozenset()) -> str:
    """Turn an article into text without templates, tables, references, files, categories, comments or markup.

    A heading goes if there is no text below it, in its own section or in a deeper one.

    hidden   further names of namespaces whose links are not text
    """
    import mwparserfromhell
    if REDIRECTION.match(wikitext):
        return ''
    wikitext = re.sub(r'-\{(.*?)\}-', choose_variant, wikitext, flags=re.DOTALL)
    text = text_of_nodes(mwparserfromhell.parse(wikitext), HIDDEN_LINKS | hidden)
    text = re.sub(r'__[A-Z]+__', '', text)
    text = re.sub(r'[(（][\s,，;；、:：]*[)）]', '', text)  # left of '({{lang|en|name}})'
    text = re.sub(r'[^\S\n]*\n[^\S\n]*', '\n', text)

    # From the last section to the first, so that it is known whether a deeper section has text.
    beginning, *sections = re.split(rf'^{HEADING_MARK}(\d)(.*)\n?', text, flags=re.MULTILINE)
    kept, level_below = [], 0
    for i in range(len(sections) - 3, -1, -3):
        level, heading, body = int(sections[i]), sections[i + 1].strip(), sections[i + 2].strip()
        if body or level_below > level:
            kept.append(f'{heading}\n{body}'.strip())
            level_below = level
    return re.sub(r'\n{3,}', '\n\n', '\n\n'.join([beginning.strip(), *reversed(kept)])).strip()


def text_of_nodes(code, hidden):
    """The text of parsed wikitext. A heading becomes a line that begins with HEADING_MARK and its level."""
    from mwparserfromhell import definitions, nodes
    parts = []
    for node in code.nodes if code is not None else ():
        if isinstance(node, nodes.Text):
            parts.append(node.value)
        elif isinstance(node, nodes.Wikilink):
            parts.append(text_of_link(node, hidden))
        elif isinstance(node, nodes.ExternalLink):
            # a bare URL is text as it stands; [URL] is shown as a number, and [URL title] as its title
            parts.append(text_of_nodes(node.title if node.brackets else node.url, hidden))
        elif isinstance(node, nodes.Heading):
            parts.append(f'\n{HEADING_MARK}{node.level}{text_of_nodes(node.title, hidden)}\n')
        elif isinstance(node, nodes.HTMLEntity):
            parts.append(node.normalize() or '')
        elif isinstance(node, nodes.Tag):
            tag = str(node.tag).strip().lower()
            if tag in LINE_TAGS:
                parts.append('\n')
            if tag not in HIDDEN_TAGS and definitions.is_visible(tag):
                parts.append(text_of_nodes(node.contents, hidden))
    return ''.join(parts)


def text_of_link(link, hidden):
    """The text of [[title|text]], or '' for a file or a category. [[:File:x]] is an ordinary link."""
    prefix, colon, _ = str(link.title).partition(':')
    if colon and prefix.strip().lower() in hidden:
        return ''
    if link.text is not None:
        return text_of_nodes(link.text, hidden)
    return str(link.title).removeprefix(':')


def choose_variant(match):
    """Choose the simplified one of several writings in Chinese wikitext: -{zh-hans:软件; zh-hant:軟體}-."""
    flags, bar, content = match[1].rpartition('|')
    if bar and not re.fullmatch(r'[A-Za-z;\s-]*', flags):
        content = match[1]
    if 'H' in flags or 'T' in flags:  # a rule for the page, or its title: it shows nothing
        return ''
    variants = {}
    for part in content.split(';'):
        name, colon, text = part.partition(':')
        if colon and re.match(r'\s*zh[\w-]*\s*$', name):
            variants[name.strip()] = text.strip()
    for name in ('zh-hans', 'zh-cn', 'zh', *variants):
        if name in variants:
            return variants[name]
    return content
