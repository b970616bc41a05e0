"""
python -m pytest tests/test_page.py: the page of a solved directory, in a real browser. needs Debian's chromium and
chromium-driver
"""
import json
import re
import shutil

import numpy as np
import pytest
from conftest import toy_tasks

from nanoarc import submission, view
from nanoarc.cli import main as cli
from nanoarc.paint import PALETTE
from nanoarc.sources import read_tasks, to_json

def solved_directory(out, data, tasks, answered):
    """ as nanoarc solve writes it: of each task what answered(number, answer) says, a list of grids """
    ranked = {}
    for k, task in enumerate(tasks):
        for i, (_, y) in enumerate(task.queries):
            ranked[k, i] = []
            for n, grid in enumerate(answered(k, y)):
                found = [(view, -0.5 - n) for view in range(9 - n)]
                ranked[k, i].append((submission.Candidate(np.array(grid, np.uint8), 9 - n, found, -1.25 - n), 0.5))
    submission.write_results(out, tasks, ranked)
    (out / 'solve.json').write_text(json.dumps({'run': 'x', 'data': data, 'leaks': []}))
    return out

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """ 4 tasks: one solved, one wrong in a cell, one without candidates, one wrong in its shape -> (page, tasks) """
    path = tmp_path_factory.mktemp('page')
    tasks = toy_tasks(n=4, queries=2, side=5)
    tasks['toy0003<b>'] = tasks.pop('toy0003')
    (path / 'toy.json').write_text(json.dumps(tasks))
    tasks = read_tasks(str(path / 'toy.json'))
    def answered(k, y):
        other = y.copy()
        other[0, 0] = (y[0, 0] + 1) % 10
        wrong_shape = np.pad(y, ((0, 1), (0, 0)))
        return [[other, y, [[3]]], [other], [], [wrong_shape]][k]
    solved_directory(path, str(path / 'toy.json'), tasks, answered)
    cli(['view', str(path), f"--out={path / 'page.html'}"])
    return path / 'page.html', tasks

def test_the_page_holds_all_and_asks_for_nothing(page):
    text = page[0].read_text()
    assert "1 of 4 solved" in text and "2 of 4" not in text
    assert 'http' not in text and not re.search(r'(src|href)\s*=\s*"(?!data:)', text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert [task['state'] for task in data['tasks']] == ['solved', 'wrong', 'empty', 'wrong']
    assert data['tasks'][3]['name'] == 'toy0003<b>' and 'toy0003<b>' not in text # a name cannot end the script
    for shown, task in zip(data['tasks'], page[1]):
        assert shown['demos'] == [[view.pack_grid(x), view.pack_grid(y)] for x, y in task.demos]

@pytest.mark.browser
def test_filters_keys_and_search_do_what_they_say(page, driver):
    from selenium.webdriver.common.by import By
    driver.get(page[0].as_uri())
    def shown():
        return [x.get_attribute('id') for x in driver.find_elements(By.TAG_NAME, 'article')]
    def key(x):
        driver.switch_to.active_element.send_keys(x)
    names = [task.name for task in page[1]]
    assert shown() == names
    buttons = {x.text.rpartition(' ')[0]: x for x in driver.find_elements(By.CSS_SELECTOR, '#filters button')}
    assert list(buttons) == ['all', 'solved', 'wrong', 'no candidate'] and buttons['wrong'].text == 'wrong 2'
    buttons['wrong'].click()
    assert shown() == [names[1], names[3]] and driver.find_element(By.ID, 'count').text == '2 of 4 tasks'
    key('f')
    assert shown() == [names[2]]
    key('f')
    assert shown() == names
    for x, want in (('j', 0), ('j', 1), ('j', 2), ('k', 1), ('j', 2), ('j', 3), ('j', 3)):
        key(x)
        assert driver.switch_to.active_element.get_attribute('id') == names[want]
    key('/')
    assert driver.switch_to.active_element.get_attribute('id') == 'search'
    key('0002')
    assert shown() == [names[2]]

@pytest.mark.browser
def test_a_task_of_the_page_opens_in_the_editor(page, driver):
    from selenium.webdriver.common.by import By
    driver.get(page[0].as_uri())
    first = driver.current_window_handle
    for task, button in zip(page[1], driver.find_elements(By.CSS_SELECTOR, 'button.edit'), strict=True):
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        driver.switch_to.window(driver.window_handles[-1])
        assert driver.execute_script("return JSON.parse(write())") == to_json(task)
        assert driver.find_element(By.ID, 'name').get_attribute('value') == task.name
        assert len(driver.find_elements(By.TAG_NAME, 'canvas')) == 2 * (len(task.demos) + len(task.queries))
        driver.close()
        driver.switch_to.window(first)

def image(shown):
    """ pixels of a canvas as the browser tells them -> (H, W, 3) """
    return np.array(shown['data']).reshape(shown['h'], shown['w'], 4)[..., :3]

@pytest.mark.browser
def test_a_grid_is_drawn_in_its_colors_and_what_is_wrong_is_marked(page, driver):
    driver.get(page[0].as_uri())
    pixels = driver.execute_script("""
        const canvas = [...document.querySelectorAll('article:first-of-type canvas')];
        const pixels = c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return canvas.map(c => ({
            label: c.getAttribute('aria-label'), w: c.width, h: c.height, data: [...pixels(c)] }));""")
    task = page[1][0]
    grids = []
    for x, y in [*task.demos, task.queries[0]]:
        grids += [x, y]
    rgb = [tuple(bytes.fromhex(x[1:])) for x in PALETTE]
    for shown, grid in zip(pixels, grids):
        assert shown['label'].endswith(view.pack_grid(grid))
        H, W = grid.shape
        side, data = (shown['w'] - 1) // W, image(shown)
        assert (shown['w'], shown['h']) == (W * side + 1, H * side + 1)
        for r in range(H):
            for c in range(W):
                middle, corner = data[r * side + side // 2, c * side + side // 2], data[r * side + 1, c * side + 1]
                assert tuple(middle) == tuple(corner) == rgb[grid[r, c]]
    wrong = pixels[len(grids)] # attempt 1 differs in its first cell
    side = (wrong['w'] - 1) // grids[-1].shape[1]
    first = np.unique(image(wrong)[1:side, 1:side].reshape(-1, 3), axis=0).tolist()
    assert [255] * 3 in first and [0] * 3 in first and len(first) == 3 # a black mark in a white one, and the color
    text = driver.execute_script("return document.querySelector('article').innerText")
    assert "attempt 1: wrong" in text
    assert "attempt 2: right\n8 votes, log p -2.25" in text
    assert "candidate 3: wrong\n7 votes, log p -3.25" in text

@pytest.mark.browser
@pytest.mark.parametrize('width', [1200, 380])
def test_no_console_error_no_outside_request_and_nothing_wider_than_the_window(page, driver, width):
    driver.get_log('browser') # what came before is not ours
    driver.get_log('performance')
    screen = {'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 600}
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    driver.get(page[0].as_uri())
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.get_log('browser') == []
    asked = [json.loads(x['message'])['message'] for x in driver.get_log('performance')]
    urls = {x['params']['request']['url'] for x in asked if x['method'] == 'Network.requestWillBeSent'}
    assert urls
    for url in urls:
        assert url == page[0].as_uri() or url.startswith('data:')
    driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})

@pytest.mark.browser
def test_light_and_dark_follow_the_system(page, driver):
    seen = []
    for scheme in ('light', 'dark'):
        feature = {'name': 'prefers-color-scheme', 'value': scheme}
        driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [feature]})
        driver.get(page[0].as_uri())
        seen.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert seen == ['rgb(255, 255, 255)', 'rgb(22, 22, 22)']

def test_400_tasks_are_less_than_5_megabytes(tmp_path):
    def answered(k, y):
        return [y] + [np.full_like(y, n) for n in range(5)]
    solved_directory(tmp_path, 'arc1/evaluation', read_tasks('arc1/evaluation'), answered)
    view.write_page(tmp_path, tmp_path / 'page.html')
    assert len(json.loads((tmp_path / 'submission.json').read_text())) == 400
    assert (tmp_path / 'page.html').stat().st_size < 5e6

def test_a_task_that_was_not_to_be_solved_is_not_on_the_page(page, tmp_path):
    shutil.copytree(page[0].parent, tmp_path / 'x')
    path = tmp_path / 'x' / 'submission.json'
    entries = json.loads(path.read_text())
    del entries['toy0000'] # the solved one
    path.write_text(json.dumps(entries))
    view.write_page(tmp_path / 'x', tmp_path / 'page.html')
    assert "0 of 3 solved" in (tmp_path / 'page.html').read_text()

@pytest.mark.parametrize('missing', ['candidates.jsonl', 'solve.json', 'line', 'data'])
def test_a_directory_that_nothing_was_solved_in_is_refused(page, tmp_path, capsys, missing):
    shutil.copytree(page[0].parent, tmp_path / 'x')
    want = missing
    if missing == 'line':
        (tmp_path / 'x' / 'candidates.jsonl').write_text('{"task": 1}\n')
        want = 'candidates.jsonl: line 1'
    elif missing == 'data':
        (tmp_path / 'x' / 'solve.json').write_text('{"run": "x"}')
        want = 'solve.json: not a solve.json'
    else:
        (tmp_path / 'x' / missing).unlink()
    if missing == 'candidates.jsonl': # what to do first
        want = f"nothing is solved in {tmp_path / 'x'} yet, want first: nanoarc solve"
    with pytest.raises(SystemExit):
        cli(['view', str(tmp_path / 'x'), f"--out={tmp_path / 'page.html'}"])
    err = capsys.readouterr().err
    assert want in err and err.count("\n") == 1

def test_a_task_shows_itself_in_a_notebook(page):
    task = page[1][3]
    html = task._repr_html_()
    cells = sum(x.size + y.size for x, y in task.demos + task.queries)
    assert html.count('<svg') == 2 * 3 + 2 * 2 and html.count('<rect') == cells
    assert '<b>' in html and '&lt;b&gt;' in html
