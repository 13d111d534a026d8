"""The chat page in a real headless Chromium, against a server of a tiny model that writes <script><script>…"""

import contextlib
import json
import re
import shutil
from urllib.parse import urlsplit

import pytest
import torch
from conftest import wait_for

for package in ('playwright', 'fastapi', 'uvicorn', 'openai'):
    pytest.importorskip(package)
from playwright.sync_api import expect, sync_playwright  # noqa: E402
from test_serve import BYTES, running  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
if CHROMIUM is None:
    pytest.skip('no chromium in PATH', allow_module_level=True)
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--no-first-run',  # no connections of its own
         '--disable-dev-shm-usage']  # which is small in a container
KEY = 'correct-horse'
PATIENCE_MS = 120_000  # for a machine that is busy
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope='module')
def servers():
    """URLs of a chat server, and of a base model's that asks for KEY."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(arch='modern', block_size=2048, vocab_size=BYTES.vocab_size, n_layer=1, n_head=2, n_embd=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    text = torch.tensor(BYTES.encode('<script>' * 33))
    for _ in range(25):
        loss = model(text[None, :-1], text[None, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running(model, style, api_key=key))[0] for style, key in (('chat', ''), ('', KEY))]


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, servers):
    """Open the page: visit() for the chat model, visit(base=True) for the base model."""
    contexts, errors, hosts = [], [], set()

    def visit(base=False, key=KEY, is_slow=False, **options):
        context = browser.new_context(**{'locale': 'en-US', **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.on('request', lambda request: hosts.add(urlsplit(request.url).hostname))
        page.add_init_script('localStorage["flatgpt settings"] ??= JSON.stringify({ seed: 1 })')  # the same answers in every run
        if base and key:
            page.add_init_script(f'sessionStorage.setItem("flatgpt key", "{key}")')
        page.goto(servers[base])
        if key:
            expect(page.locator('#model')).to_have_text('m')  # until then the page does not send
        if is_slow:  # 20 KB/s: an answer of 2000 tokens takes a minute
            limits = {'offline': False, 'latency': 0, 'downloadThroughput': 20_000, 'uploadThroughput': -1}
            context.new_cdp_session(page).send('Network.emulateNetworkConditions', limits)
        return page
    yield visit
    for context in contexts:
        context.close()
    assert not errors and hosts <= {'127.0.0.1'}


def ask(page, text):
    """Send a message with the keyboard and wait for the whole answer. Return the answer's text."""
    page.fill('#box', text)
    page.press('#box', 'Enter')
    page.wait_for_selector('#again')
    return page.inner_text('.assistant:last-child .text')


def setting(page, name, value):
    page.eval_on_selector(f'[name={name}]', 'field => { field.max = 1e9; field.value = ' f'{value!r}; '
                          'field.dispatchEvent(new Event("input", { bubbles: true })); }')


def test_markup_in_questions_and_answers_is_shown_as_text(visit):
    page = visit()
    question = '<img src=x onerror="document.title=1"><b>bold</b>'
    assert '<script><script>' in ask(page, question)
    assert page.inner_text('.user .text') == question
    assert page.locator('#log').locator('script, img, b').count() == 0
    assert page.title() == 'm'


def test_the_page_loads_nothing_from_another_host(visit, servers):
    page = visit()
    for directive, load in (('connect-src', 'fetch(url).catch(() => {})'), ('img-src', 'new Image().src = url')):
        violation = page.evaluate("""url => new Promise(done => {
            addEventListener('securitypolicyviolation', event => done(event.effectiveDirective), { once: true });
            setTimeout(done, 60_000, 'none');
            %s;
        })""" % load, servers[True] + '/v1/models')  # another port is another host
        assert violation == directive


def begin_a_long_answer(visit):
    page = visit(is_slow=True)
    setting(page, 'max_tokens', 2000)
    page.fill('#box', 'go')
    page.press('#box', 'Enter')
    page.wait_for_selector('.token')
    return page


def test_an_answer_streams_and_escape_stops_it(visit):
    page = begin_a_long_answer(visit)
    expect(page.locator('#send')).to_have_text('Stop')
    page.keyboard.press('Escape')
    expect(page.locator('.note')).to_have_text(['', 'stopped'])
    expect(page.locator('#send')).to_have_text('Send')
    assert 0 < len(page.inner_text('.assistant .text')) < 1900


def test_the_stop_button_stops_and_regenerate_writes_another_answer(visit):
    page = begin_a_long_answer(visit)
    page.wait_for_selector('.token >> nth=16')
    page.click('#send')
    page.wait_for_selector('#again')
    before = page.inner_text('.assistant .text')
    setting(page, 'max_tokens', 8)
    page.click('#again')
    page.wait_for_selector('#again')
    assert page.locator('.turn').count() == 2
    assert len(page.inner_text('.assistant .text')) <= 8 < len(before)
    expect(page.locator('.assistant .note')).to_contain_text('8 tokens')


def test_conversation_and_settings_survive_a_reload(visit):
    page = visit()
    setting(page, 'temperature', 0)
    setting(page, 'max_tokens', 16)
    answer = ask(page, 'first')
    page.reload()
    expect(page.locator('.text')).to_have_text(['first', answer])
    assert page.input_value('[name=temperature]') == '0'
    page.click('#new')
    page.reload()
    expect(page.locator('.intro')).to_be_visible()
    assert page.locator('.turn').count() == 0


def test_reload_in_the_middle_of_an_answer_keeps_what_came(visit):
    page = begin_a_long_answer(visit)
    page.reload()
    expect(page.locator('.assistant .text')).not_to_be_empty()
    expect(page.locator('#send')).to_have_text('Send')


def test_nothing_overflows_a_screen_of_360_pixels(visit):
    for locale in ('en-US', 'zh-CN'):
        page = visit(viewport={'width': 360, 'height': 640}, locale=locale)
        ask(page, 'word' * 40)
        for selector in ('#toggle', '#box', '#send'):
            box = page.locator(selector).bounding_box()
            assert box['x'] >= 0 and box['x'] + box['width'] <= 360 and box['y'] + box['height'] <= 640
        page.click('#toggle')
        for selector in ('html', '#log', '#settings'):
            assert page.eval_on_selector(selector, 'node => node.scrollWidth - node.clientWidth') == 0
        assert page.locator('header').bounding_box()['height'] < 60
        assert page.locator('.assistant .note').bounding_box()['x'] >= 0
        page.hover('.token')
        expect(page.locator('#alternatives')).to_be_visible()
        tip = page.locator('#alternatives').bounding_box()
        assert tip['x'] >= 0 and tip['x'] + tip['width'] <= 360


def test_everything_can_be_reached_with_the_keyboard(visit):
    page = visit()
    setting(page, 'temperature', 0)
    expect(page.locator('#box')).to_be_focused()
    expect(page.locator('.intro')).to_be_visible()
    page.keyboard.type('one')
    page.keyboard.press('Shift+Enter')
    page.keyboard.type('two')
    page.keyboard.press('Enter')
    page.wait_for_selector('#again')
    assert page.inner_text('.user .text') == 'one\ntwo'
    focused, visited = '', []
    page.focus('#toggle')
    page.keyboard.press('Enter')
    page.focus('#box')
    while focused != 'box' and len(visited) < 40:
        page.keyboard.press('Tab')
        focused = page.evaluate('document.activeElement.id || document.activeElement.name || '
                                'document.activeElement.className')
        visited.append(focused)
        if focused == 'token':
            chosen = page.locator('#alternatives .chosen code')
            expect(chosen).to_have_text(page.inner_text('.token >> nth=0'))
            page.keyboard.press('ArrowRight')
            expect(page.locator('.token >> nth=1')).to_be_focused()
            expect(chosen).to_have_text(page.inner_text('.token >> nth=1'))
            assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    wanted = {'new', 'toggle', 'language', 'theme', 'temperature', 'log', 'copy', 'token', 'again', 'box', 'send'}
    assert wanted <= set(visited)


def test_enter_in_an_input_method_does_not_send(visit):
    page = visit()
    page.fill('#box', 'ni hao')
    key = {'key': 'Enter', 'bubbles': True}
    page.dispatch_event('#box', 'keydown', {**key, 'isComposing': True})
    page.dispatch_event('#box', 'keydown', {**key, 'keyCode': 229})
    assert page.locator('.turn').count() == 0
    page.dispatch_event('#box', 'keydown', key)
    expect(page.locator('.user .text')).to_have_text('ni hao')


def test_pointing_at_a_token_shows_its_alternatives(visit):
    page = visit()
    setting(page, 'temperature', 0)
    ask(page, 'go')
    page.hover('.token >> nth=9')
    expect(page.locator('#alternatives .row')).to_have_count(5)
    rows = page.locator('#alternatives .row').all_inner_texts()
    assert page.inner_text('#alternatives .chosen') == rows[0]
    assert page.inner_text('#alternatives .chosen code') == page.inner_text('.token >> nth=9')
    percents = [float(re.search(r'([\d.]+)%', row)[1]) for row in rows]
    assert percents == sorted(percents, reverse=True) and sum(percents) < 101
    page.hover('#box')
    expect(page.locator('#alternatives')).to_be_hidden()


def test_a_base_model_continues_one_text(visit):
    page = visit(base=True)
    expect(page.locator('.intro')).to_contain_text('base model')
    assert not page.locator('#system-row').is_visible()
    setting(page, 'max_tokens', 8)
    setting(page, 'temperature', 0)
    assert ask(page, '<scr') == 'ipt><scr'
    expect(page.locator('#send')).to_have_text('Continue')
    page.click('#send')
    expect(page.locator('.text')).to_have_text(['<scr', 'ipt><scr', 'ipt><scr'])
    page.hover('.token >> nth=1')
    expect(page.locator('#alternatives .chosen code')).to_have_text('p')


def test_a_long_conversation_opens_at_its_end_and_does_not_jump(visit):
    page = visit()
    turns = [turn for i in range(60) for turn in ({'role': 'user', 'text': f'question {i}'},
                                                  {'role': 'assistant', 'text': 'answer ' * 300})]
    page.add_init_script(f'localStorage["flatgpt turns m"] = {json.dumps(json.dumps(turns))}')
    page.reload()
    expect(page.locator('.turn')).to_have_count(120)
    below = 'log => log.scrollHeight - log.scrollTop - log.clientHeight'
    assert page.eval_on_selector('#log', below) < 2
    setting(page, 'max_tokens', 1500)
    page.fill('#box', 'go')
    page.press('#box', 'Enter')
    page.wait_for_selector('.token')
    page.eval_on_selector('#log', 'log => { log.scrollTop = 500; }')
    page.wait_for_selector('#again')
    assert page.eval_on_selector('#log', 'log => log.scrollTop') == 500


@pytest.mark.parametrize('base', [False, True], ids=['chat', 'base'])
def test_the_beginning_is_left_out_where_the_context_has_no_room_for_it(visit, base):
    page = visit(base)
    setting(page, 'max_tokens', 8)
    ask(page, '<script>' * 150)
    assert ask(page, '<script>' * 150)
    expect(page.locator('.note').last).to_contain_text('left out')
    page.reload()
    expect(page.locator('.turn')).to_have_count(4)


def test_dark_follows_the_system_and_the_switch(visit):
    page = visit(color_scheme='dark')

    def brightness():
        return sum(map(int, re.findall(r'\d+', page.eval_on_selector('body', 'b => getComputedStyle(b).backgroundColor'))))
    assert brightness() < 200
    page.click('#theme')
    assert brightness() > 600
    page.reload()
    assert brightness() > 600


def test_the_page_speaks_chinese(visit):
    page = visit(locale='zh-CN')
    expect(page.locator('#send')).to_have_text('发送')
    assert page.get_attribute('html', 'lang') == 'zh-CN'
    page.click('#language')
    expect(page.locator('#send')).to_have_text('Send')
    page.reload()
    expect(page.locator('#send')).to_have_text('Send')


def test_a_server_with_a_key_asks_for_it(visit):
    page = visit(base=True, key=None)
    for key in ('wrong', KEY):
        expect(page.locator('#error')).to_contain_text('The server needs a valid API key.')
        expect(page.locator('#key')).to_be_focused()
        # a key that was wrong is selected, to be replaced
        wait_for(lambda: page.eval_on_selector('#key', 'key => key.selectionEnd - key.selectionStart === key.value.length'))
        with page.expect_response('**/v1/models'):
            page.keyboard.type(key)
            page.keyboard.press('Enter')
    expect(page.locator('#model')).to_have_text('m')
    expect(page.locator('#error')).to_be_hidden()
    page.reload()
    expect(page.locator('#model')).to_have_text('m')
    assert KEY not in page.evaluate('JSON.stringify(localStorage)')


def test_a_second_page_does_not_overwrite_a_later_conversation(visit):
    page = visit()
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator('.intro')).to_be_visible()
    answer = ask(page, 'first')
    other.goto('about:blank')
    page.reload()
    expect(page.locator('.text')).to_have_text(['first', answer])


def test_an_error_is_told_in_words_and_the_question_is_kept(visit):
    page = visit()
    setting(page, 'seed', 0.5)
    page.fill('#box', 'go')
    page.press('#box', 'Enter')
    expect(page.locator('#error')).to_contain_text('The server refused the request. seed')
    assert page.input_value('#box') == 'go' and page.locator('.turn').count() == 0
    page.context.set_offline(True)
    page.press('#box', 'Enter')
    expect(page.locator('#error')).to_have_text('The server does not answer. Is it still running?')


def test_copy_puts_the_answer_on_the_clipboard(visit):
    page = visit()
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    answer = ask(page, 'go')
    page.eval_on_selector('.assistant .copy', 'button => { window.shown = []; const note = () => shown.push(button.textContent); '
                          'new MutationObserver(note).observe(button, { childList: true }); }')
    page.click('.assistant .copy')
    wait_for(lambda: 'Copied' in page.evaluate('shown'))  # for a second and a half
    assert page.evaluate('navigator.clipboard.readText()') == answer
