"""
how large is the page of a solved directory, and how soon does it open? all 400 tasks of arc1/evaluation with four
candidates a query, in a headless chromium: from asking for the file to the end of its load event, and to the last
task drawn. usage: python bench/page.py. last line: json
"""
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from selenium import webdriver

from nanoarc.sources import read_tasks
from nanoarc.submission import Candidate, write_results
from nanoarc.view import write_page

LOAD_TIME = """
    const t = performance.getEntriesByType('navigation')[0];
    return t.loadEventEnd - t.startTime"""

def main(rounds=5):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium') or shutil.which('google-chrome')
    for flag in ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--window-size=1200,900'):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which('chromedriver')))
    with tempfile.TemporaryDirectory() as temp:
        path, tasks, rng = Path(temp), read_tasks('arc1/evaluation'), np.random.default_rng(0)
        ranked = {}
        for k, task in enumerate(tasks):
            for i, (_, y) in enumerate(task.queries):
                ranked[k, i] = []
                for _ in range(4): # a tenth of the cells is wrong
                    noise = rng.integers(0, 10, y.shape)
                    grid = np.where(rng.random(y.shape) < 0.1, noise, y).astype(np.uint8)
                    ranked[k, i].append((Candidate(grid, 3, [(0, -0.5)], -1.25), 0.5))
        write_results(path, tasks, ranked)
        (path / 'solve.json').write_text(json.dumps({'run': 'x', 'data': 'arc1/evaluation', 'leaks': []}))
        write_page(path, path / 'page.html')
        loads, drawn = [], []
        for _ in range(rounds):
            driver.get('about:blank')
            start = time.perf_counter()
            driver.get((path / 'page.html').as_uri()) # returns behind the load event
            while driver.execute_script("return document.querySelectorAll('article').length") < len(tasks):
                time.sleep(0.01)
            drawn.append(time.perf_counter() - start)
            loads.append(driver.execute_script(LOAD_TIME) / 1000)
        driver.quit()
        result = {'tasks': len(tasks), 'mb': round((path / 'page.html').stat().st_size / 1e6, 2),
                  'load_s': round(median(loads), 2), 'all_drawn_s': round(median(drawn), 2), 'rounds': rounds}
        print(json.dumps(result))

if __name__ == '__main__':
    main()
