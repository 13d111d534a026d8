"""Read the articles of a MediaWiki dump as plain text. mwparserfromhell parses the wikitext."""

import re
import xml.etree.ElementTree as ET
from typing import NamedTuple

HIDDEN_LINKS = {'file', 'image', 'media', 'category', '文件', '檔案', '档案', '图像', '圖像', '分类', '分類'}
HIDDEN_TAGS = {'table', 'ref', 'references', 'gallery', 'math', 'chem', 'timeline', 'style', 'templatestyles',
               'syntaxhighlight', 'mapframe'}
LINE_TAGS = ('br', 'hr', 'p', 'div')
REDIRECTION = re.compile(r'\s*#\s*(redirect|重定向|重新導向)', re.IGNORECASE)
MARK = '\x02'  # followed by the level of the heading that the rest of the line holds


class Page(NamedTuple):
    title: str
    wikitext: str
    hidden: set  # the namespaces of files and categories


def read_pages(file, path):
    """Yield every Page of the main namespace that is wikitext and no redirection."""
    hidden = set(HIDDEN_LINKS)
    try:
        events = ET.iterparse(file, events=('start', 'end'))
        _, root = next(events)
        if local_name(root) != 'mediawiki':
            raise ValueError(f'{path}: its first element is <{local_name(root)}>, '
                             'not the <mediawiki> of a MediaWiki dump')
        for event, element in events:
            name = local_name(element)
            if event == 'end' and name == 'namespace' and element.get('key') in ('6', '14'):
                hidden.add((element.text or '').lower())
            if event == 'end' and name == 'page':
                page = {'ns': '0', 'model': 'wikitext', 'title': '', 'text': ''}
                page.update((local_name(child), child.text or '') for child in element.iter())
                if (page['ns'], page['model']) == ('0', 'wikitext') and 'redirect' not in page:
                    yield Page(page['title'], page['text'], hidden)
                file.n_pending = 0
                root.clear()  # the parser keeps every element it has seen
    except ET.ParseError as error:
        reason = error.msg.partition(':')[0]
        raise ValueError(f'{path}, line {error.position[0]}: not XML, or cut short: {reason}') from None


def local_name(element):
    return element.tag.rpartition('}')[2]


def plain_text(wikitext: str, hidden=HIDDEN_LINKS) -> str:
    """Remove templates, tables, references, comments, markup, and headings without text below them.

    hidden   names of namespaces whose links are not text
    """
    import mwparserfromhell
    if REDIRECTION.match(wikitext):
        return ''
    wikitext = re.sub(r'-\{(.*?)\}-', choose_variant, wikitext, flags=re.DOTALL)
    text = text_of_nodes(mwparserfromhell.parse(wikitext), hidden)
    text = re.sub(r'__[A-Z]+__', '', text)
    text = re.sub(r'[(（][\s,，;；、:：]*[)）]', '', text)  # left of '({{lang|en|name}})'
    text = re.sub(r'[^\S\n]*\n[^\S\n]*', '\n', text)

    for level in (6, 5, 4, 3, 2, 1):  # from the deepest up: a section of empty sections is empty, too
        text = re.sub(rf'^{MARK}{level}.*\s*(?={MARK}[1-{level}]|\Z)', '', text, flags=re.MULTILINE)
    text = re.sub(rf'\s*^{MARK}\d(.*)$\s*', r'\n\n\1\n', text, flags=re.MULTILINE)
    return re.sub(r'\n{3,}', '\n\n', text).strip()


def text_of_nodes(code, hidden):
    if code is None:
        return ''
    return ''.join(text_of_node(node, hidden) for node in code.nodes)


def text_of_node(node, hidden):
    """Return the text of a piece of wikitext. A heading becomes a line with MARK and its level."""
    kind = type(node).__name__
    if kind == 'Text':
        return node.value
    if kind == 'HTMLEntity':
        return node.normalize() or ''
    if kind == 'Heading':
        return f'\n{MARK}{node.level}{text_of_nodes(node.title, hidden).strip()}\n'
    if kind == 'ExternalLink' and not node.brackets:
        return text_of_nodes(node.url, hidden)
    if kind == 'ExternalLink':
        return text_of_nodes(node.title, hidden)
    if kind == 'Wikilink':  # [[title|text]]; [[:File:x]] is an ordinary link
        title = str(node.title)
        prefix, colon, _ = title.partition(':')
        if colon and prefix.strip().lower() in hidden:
            return ''
        if node.text is None:
            return title.removeprefix(':')
        return text_of_nodes(node.text, hidden)
    if kind == 'Tag':
        from mwparserfromhell.definitions import is_visible
        tag, text = str(node.tag).strip().lower(), ''
        if tag in LINE_TAGS:
            text = '\n'
        if tag not in HIDDEN_TAGS and is_visible(tag):
            text += text_of_nodes(node.contents, hidden)
        return text
    return ''  # a template, an argument, a comment


def choose_variant(match):
    """Choose the simplified one of several writings, such as -{zh-hans:软件; zh-hant:軟體}-."""
    flags, bar, content = match[1].rpartition('|')
    if bar and not re.fullmatch(r'[A-Za-z;\s-]*', flags):
        content = match[1]
    if 'H' in flags or 'T' in flags:  # a rule for the page, or its title: it shows nothing
        return ''
    variants = dict(re.findall(r'(?:^|;)\s*(zh[\w-]*)\s*:\s*([^;]*?)\s*(?=;|$)', content))
    for name in ('zh-hans', 'zh-cn', 'zh', *variants):
        if name in variants:
            return variants[name]
    return content
