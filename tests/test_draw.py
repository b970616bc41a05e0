"""
python -m pytest tests/test_draw.py: the editor of tasks, in a real browser, and what becomes of a task drawn there.
needs Debian's chromium and chromium-driver
"""
import json
import time

import pytest
from conftest import TINY, toy_tasks

from nanoarc.cli import main as cli
from nanoarc.sources import read_tasks, to_json

def test_the_editor_is_one_page_that_asks_for_nothing(tmp_path, capsys):
    task = toy_tasks(1)['toy0000']
    (tmp_path / 'x.json').write_text(json.dumps({'a</script>': task}))
    cli(['draw', 'a</script>', f"--data={tmp_path / 'x.json'}", f"--out={tmp_path / 'deep' / 'draw.html'}"])
    out, text = capsys.readouterr().out, (tmp_path / 'deep' / 'draw.html').read_text()
    assert str(tmp_path / 'deep' / 'draw.html') in out and "nanoarc solve --run RUN --data" in out
    assert 'http' not in text and 'a</script>' not in text and 'STYLE' not in text and 'DATA' not in text
    data = text.partition('id="data">')[2].partition('</script>')[0]
    assert json.loads(data)['task'] == task

@pytest.mark.parametrize('args, want', [(['nosuch'], "no task and no directory named nosuch"),
                                        (['--out=x.png'], "--out x.png: want a .html")])
def test_what_cannot_be_drawn_is_said(args, want, capsys):
    with pytest.raises(SystemExit) as e:
        cli(['draw', *args])
    assert e.value.code == 2 and want in capsys.readouterr().err

def test_a_task_goes_through_its_file_unchanged(tmp_path):
    for task in read_tasks('arc1/evaluation')[:9]:
        task.queries[0] = task.queries[0][0], None # one answer is open
        (tmp_path / f"{task.name}.json").write_text(json.dumps(to_json(task)))
        again, = read_tasks(str(tmp_path / f"{task.name}.json"))
        assert again.name == task.name and to_json(again) == to_json(task) and again.queries[0][1] is None

# -----------------------------------------------------------------------------
# drawn by hand

NULL, TAB, CTRL, SPACE, UP, RIGHT = "\ue000", "\ue004", "\ue009", " ", "\ue013", "\ue014" # for WebDriver

class Hand:
    """ somebody at the editor """

    def __init__(self, driver, url, downloads):
        self.driver, self.downloads = driver, downloads
        folder = {'behavior': 'allow', 'downloadPath': str(downloads)}
        driver.execute_cdp_cmd('Browser.setDownloadBehavior', folder)
        driver.get(url)

    def find(self, name):
        return self.driver.find_element('id', name)

    def click(self, *names):
        for name in names:
            self.find(name).click()

    def write(self, name, text):
        x = self.find(name)
        x.send_keys(CTRL, 'a', NULL, str(text), TAB)

    def drag(self, grid, *cells, kind='mouse'):
        """ a stroke over the middles of cells, (row, col) each, by mouse, touch or pen """
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput
        canvas = self.find(grid)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        script = """const b = arguments[0].getBoundingClientRect(), s = arguments[1];
            return [b.left, b.top, b.width / s[1], b.height / s[0]]"""
        numbers = [int(x) for x in canvas.get_attribute('aria-label').split() if x.isdigit()]
        shape = numbers[1:3] # after that of the pair
        left, top, w, h = self.driver.execute_script(script, canvas, shape)
        actions = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=20)
        pointer = actions.pointer_action
        for k, (r, c) in enumerate(cells):
            pointer.move_to_location(int(left + (c + 0.5) * w), int(top + (r + 0.5) * h))
            if k == 0:
                pointer.pointer_down()
        pointer.pointer_up()
        actions.perform()

    def keys(self, grid, *keys):
        for key in keys:
            self.find(grid).send_keys(key)

    def task(self):
        """ what it would save """
        return self.driver.execute_script("return JSON.parse(write())")

    def save(self, name):
        """ -> path of the file that it downloads """
        self.write('name', name)
        self.click('save')
        path = self.downloads / f"{name}.json"
        for _ in range(100):
            if path.exists() and path.stat().st_size:
                break
            time.sleep(0.05)
        return path

@pytest.fixture
def editor(driver, tmp_path):
    """ -> a Hand at an empty editor """
    cli(['draw', f"--out={tmp_path / 'draw.html'}"])
    return Hand(driver, (tmp_path / 'draw.html').as_uri(), tmp_path)

@pytest.mark.browser
def test_what_is_painted_is_what_is_saved(editor):
    """ by mouse, touch and keyboard; sizes, fill, copies, more pairs and fewer """
    editor.drag('train-0-input', (0, 0), (2, 2)) # a diagonal
    editor.keys('train-0-input', '4')
    editor.drag('train-0-input', (1, 0), kind='touch')
    editor.keys('train-0-input', '7', SPACE, RIGHT, RIGHT, UP, SPACE) # at (0, 0), then over the edge at (2, 2)
    editor.click('train-0-copy')
    editor.write('train-0-output-columns', 5)
    editor.keys('train-0-output', '2', 'f')
    editor.drag('train-0-output', (0, 4)) # what is black and hangs together
    editor.click('more-train')
    editor.write('train-2-input-rows', 1)
    editor.write('train-2-input-columns', 99) # 30 at most
    editor.click('train-1-remove', 'paint')
    editor.drag('train-1-input', (0, 0), (0, 29), kind='pen')
    editor.drag('test-0-input', (1, 1))
    editor.click('more-test', 'test-1-copy')
    editor.drag('test-1-output', (2, 1))
    want = {'train': [{'input': [[7, 0, 0], [4, 1, 0], [0, 0, 7]],
                       'output': [[7, 2, 2, 2, 2], [4, 1, 2, 2, 2], [0, 0, 7, 2, 2]]},
                      {'input': [[2] * 30], 'output': [[0] * 3] * 3}],
            'test': [{'input': [[0, 0, 0], [0, 2, 0], [0, 0, 0]]},
                     {'input': [[0] * 3] * 3, 'output': [[0, 0, 0], [0, 0, 0], [0, 2, 0]]}]}
    path = editor.save('mine')
    assert json.loads(path.read_text()) == want
    task, = read_tasks(str(path))
    assert task.name == 'mine' and to_json(task) == want
    assert "nanoarc solve --run RUN --data mine.json" in editor.find('said').text

@pytest.mark.browser
def test_undo_goes_back_step_by_step_and_redo_forth(editor):
    seen = [editor.task()]
    for do in (lambda: editor.drag('train-0-input', (0, 0), (0, 2), (2, 2)), # a stroke is one step
               lambda: editor.write('train-0-input-rows', 1),
               lambda: editor.click('more-train'), lambda: editor.keys('test-0-input', '3', SPACE),
               lambda: editor.click('test-0-copy')):
        do()
        assert editor.task() != seen[-1]
        seen.append(editor.task())
    editor.drag('test-0-input', (0, 0)) # it has this color already: no step
    for want in seen[-2::-1]:
        editor.click('undo')
        assert editor.task() == want
    assert not editor.find('undo').is_enabled()
    for want in seen[1:]:
        editor.driver.switch_to.active_element.send_keys(CTRL + 'y')
        assert editor.task() == want
    assert not editor.find('redo').is_enabled()

PAIR = {'input': [[1, 2], [3, 4]], 'output': [[1, 2], [3, 4]]}

def asked(grid):
    """ a task whose query has this input """
    return json.dumps({'train': [PAIR], 'test': [{'input': grid}]})

@pytest.mark.browser
@pytest.mark.parametrize('text, want', [
    ('{"train": [', "not json: "),
    ('[1, 2]', "want one task"),
    ('{"a": 1, "b": 2}', "2 tasks or other things, want one task"),
    (json.dumps({'train': [PAIR]}), '"test": want a list of pairs, at least one query, got nothing'),
    (json.dumps({'train': [], 'test': [PAIR]}), '"train": want a list of pairs'),
    (json.dumps({'train': [PAIR, {'input': [[1]]}], 'test': [PAIR]}), "demo 1, output: want 1 to 30 rows, got nothing"),
    (json.dumps({'train': [PAIR], 'test': [7]}), 'query 0: want {"input": rows, "output": rows}, got 7'),
    (asked([[1, 2], [3, 10]]), "query 0, input, row 1, col 1: 10 is no color"),
    (asked([[1, True]]), "query 0, input, row 0, col 1: true is no color"),
    (asked([[1, 2], [3]]), "query 0, input, row 1: 1 colors, row 0 has 2"),
    (asked([[0]] * 31), "query 0, input: want 1 to 30 rows, got 31"),
])
def test_malformed_json_says_what_is_wrong_and_loses_nothing(editor, text, want):
    editor.drag('train-0-input', (0, 0))
    before = editor.task()
    editor.click('json')
    box = editor.driver.find_element('css selector', 'textarea')
    assert json.loads(box.get_attribute('value')) == before
    editor.driver.execute_script("arguments[0].value = arguments[1]", box, text)
    editor.click('use')
    assert want in editor.find('wrong').text and editor.task() == before
    assert box.get_attribute('value') == text # there to be mended
    good = {'train': [{'input': [[5]], 'output': [[6]]}], 'test': [{'input': [[7]], 'output': None}]}
    editor.driver.execute_script("arguments[0].value = arguments[1]", box, json.dumps({'xyz': good}))
    editor.click('use')
    del good['test'][0]['output']
    assert editor.task() == good and editor.find('name').get_attribute('value') == 'xyz'
    editor.click('undo')
    assert editor.task() == before

@pytest.mark.browser
def test_a_file_and_a_paste_are_taken_too(editor, tmp_path):
    tasks = toy_tasks(2)
    for name, task in tasks.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    editor.find('file').send_keys(str(tmp_path / 'toy0001.json'))
    for _ in range(100):
        if editor.task() == tasks['toy0001']:
            break
        time.sleep(0.02)
    assert editor.task() == tasks['toy0001'] and editor.find('name').get_attribute('value') == 'toy0001'
    paste = """const data = new DataTransfer();
        data.setData('text', arguments[0]);
        document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}));"""
    editor.driver.execute_script(paste, json.dumps(tasks['toy0000']))
    assert editor.task() == tasks['toy0000']
    editor.driver.execute_script(paste, "hello")
    assert "not json" in editor.find('said').text and editor.task() == tasks['toy0000']

@pytest.mark.browser
@pytest.mark.parametrize('scheme, width', [('light', 1200), ('dark', 380), ('light', 320)])
def test_it_fits_a_phone_light_and_dark_and_asks_nobody(driver, tmp_path, scheme, width):
    cli(['draw', '05a7bcf2', f"--out={tmp_path / 'draw.html'}"]) # of 30 x 30
    driver.get('about:blank')
    driver.get_log('browser') # what came before is not ours
    driver.get_log('performance')
    feature = {'name': 'prefers-color-scheme', 'value': scheme}
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [feature]})
    screen = {'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 600}
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
    hand = Hand(driver, (tmp_path / 'draw.html').as_uri(), tmp_path)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    color = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert color == {'light': 'rgb(255, 255, 255)', 'dark': 'rgb(22, 22, 22)'}[scheme]
    hand.drag('train-0-input', (29, 0), (29, 29), kind='touch')
    assert hand.task()['train'][0]['input'][29] == [1] * 30
    pixels = driver.execute_script("""const c = document.getElementById('train-0-input'), s = (c.width - 1) / 30;
        return [...c.getContext('2d').getImageData(s / 2, 29.5 * s, 1, 1).data]""")
    assert pixels[:3] == [0x00, 0x74, 0xd9]
    assert driver.get_log('browser') == []
    asked = [json.loads(x['message'])['message'] for x in driver.get_log('performance')]
    urls = {x['params']['request']['url'] for x in asked if x['method'] == 'Network.requestWillBeSent'}
    assert all(url.startswith(('file:', 'data:')) for url in urls) and len(urls) > 0
    driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})

# -----------------------------------------------------------------------------
# solved

@pytest.mark.parametrize('flags', [['--shots=-1'], ['--shots=0', '--ttt_steps=2']])
def test_a_task_of_ones_own_is_solved_in_context_or_by_test_time_training(toy, tmp_path, flags):
    run, shots, ttt = str(tmp_path / 'run'), flags[0], flags[1:]
    cli(['train', f"--data={toy(n=4, side=3)}", shots, f"--out_dir={run}", '--max_iters=2', '--val_tasks=0', *TINY])
    task = toy_tasks(n=1, side=3, seed=9)['toy0000']
    del task['test'][0]['output']
    (tmp_path / 'my.json').write_text(json.dumps(task))
    out = tmp_path / 'my'
    cli(['solve', '--run', run, f"--data={tmp_path / 'my.json'}", f"--out_dir={out}", '--views=2', '--device=cpu',
         *ttt])
    submission = json.loads((out / 'submission.json').read_text())
    assert list(submission) == ['my'] and len(submission['my']) == 1
    assert len((out / 'candidates.jsonl').read_text().splitlines()) > 0
    cli(['view', 'my', f"--data={tmp_path / 'my.json'}", f"--submission={out / 'submission.json'}"])
