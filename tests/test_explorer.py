"""docs/explorer.html: what its generator makes; in headless Chromium equal to piflow_minimal."""

import re
import time

import pytest
import torch
from browser import open_browser

from common.teachers import integrate_teacher
from docs.explorer import DOCS, load, make_page
from piflow_minimal import (
    GaussianMixture,
    GMFlowPolicy,
    pi_id_loss,
    rollout,
    sample,
)
from toy_2d import make_density

PAGE = DOCS / "explorer.html"
COUNT = 50
TOLERANCE = {"atol": 1e-9, "rtol": 0.0}


def test_the_page_is_what_the_generator_makes():
    page = PAGE.read_text(encoding="utf-8")
    assert page == make_page(), "run python -m docs.explorer"
    assert len(page.encode()) <= 300_000


def test_the_page_loads_nothing():
    page = PAGE.read_text("utf-8").replace('<link rel="icon" href="data:,">', "")
    assert not re.search(r"https?:|\bsrc=|@import|url\(|fetch\(|<link", page)


# ==== In a browser ================================================================================


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The page from its file, without animation; no console error in the whole module."""
    driver = open_browser(tmp_path_factory.mktemp("profile"), "force-prefers-reduced-motion")
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        driver.get(PAGE.as_uri())
        yield driver
        assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        severe = [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]
        assert not severe, severe
    finally:
        driver.quit()


@pytest.fixture
def page(browser):
    """The browser, with the page in its first state."""
    browser.execute_script("setState(DEFAULTS)")
    return browser


def compute(page, expression: str, *values) -> torch.Tensor:
    """A JavaScript expression of `a`, the list of values."""
    lists = [v.tolist() if isinstance(v, torch.Tensor) else v for v in values]
    result = page.execute_script(f"const a = arguments; return {expression};", *lists)
    return torch.tensor(result, dtype=torch.float64)


@pytest.fixture(scope="module")
def states():
    """Noises, states and times: (COUNT, 2), (COUNT, 2), (COUNT,) in (0, 1]."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    noise, x = torch.randn(2, COUNT, 2, **options)
    t = torch.rand(COUNT, **options)
    t[0], t[1], t[2] = 1.0, 0.001, 0.8  # the ends, and where quadrature takes over
    return noise, 1.5 * x, t


def teacher():
    return make_density("checkerboard").double().velocity


def test_erfcx(page):
    y = torch.linspace(-6, 40, 461, dtype=torch.float64)
    here = compute(page, "a[0].map(erfcx)", y)
    torch.testing.assert_close(here, torch.special.erfcx(y), rtol=1e-12, atol=0)


def test_teacher(page, states):
    noise, x, t = states
    here = compute(page, "a[0].map((x, i) => teacherPolicy.velocity(x, a[1][i]))", x, t)
    torch.testing.assert_close(here, teacher()(x, t), **TOLERANCE)
    path = "rollout(teacherPolicy, x, 1, 0, 128, 'euler')"
    here = compute(page, f"a[0].map((x) => {path}.map((s) => s.x))", noise)
    reference = []
    integrate_teacher(teacher(), noise, 128, callback=lambda i, t, x: reference.append(x))
    torch.testing.assert_close(here, torch.stack(reference, 1), **TOLERANCE)


@pytest.mark.parametrize("name", ["gmflow", "dx"])
def test_policy(page, states, name):
    """The network and its policy: at all source levels, at later states."""
    noise, x, share = states
    t_src = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64).repeat(COUNT)[:COUNT]
    t = share * t_src
    policy = load(name).double()(noise, t_src)
    network = f"evaluateNetwork(STUDENTS.{name}, x, a[1][i])"
    here = compute(page, f"a[0].map((x, i) => {network}.velocity(a[2][i], a[3][i]))",
                   noise, t_src, x, t)  # fmt: skip
    torch.testing.assert_close(here, policy.velocity(x, t), **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "solver"),
    [("gmflow", "euler"), ("gmflow", "deis"), ("dx", "euler"), ("dx", "deis"), ("dx", "exact")],
)
def test_rollout_and_sample(page, states, name, solver):
    """Every number of substeps and evaluations that the page offers."""
    noise, student = states[0], load(name).double()
    make = f"(x, t) => evaluateNetwork(STUDENTS.{name}, x, t)"
    for substeps in (1, 4, 16, 128):
        for nfe in (1, 2, 4):
            segments = f"sample({make}, x, {nfe}, {substeps}, '{solver}')"
            here = compute(page, f"a[0].map((x) => {segments}.at(-1).states.at(-1).x)", noise)
            reference = sample(student, noise, nfe, total_substeps=substeps, solver=solver)
            torch.testing.assert_close(here, reference, **TOLERANCE)


@pytest.mark.parametrize("name", ["gmflow", "dx"])
@pytest.mark.parametrize("t", [0.4, 0.5])
def test_push(page, states, name, t):
    """A displacement between two evaluations, and one just before the second, which sees it."""
    noise, by = states[0], states[1]
    make = f"(x, t) => evaluateNetwork(STUDENTS.{name}, x, t)"
    pushed = f"sample({make}, x, 2, 16, 'euler', {{ t: {t}, by: a[1][i] }})"
    here = compute(page, f"a[0].map((x, i) => {pushed}[1].states.at(-1).x)", noise, by)
    student = load(name).double()
    ones = torch.ones(COUNT, dtype=torch.float64)
    x = rollout(student(noise, ones), noise, 1.0, 0.5, total_substeps=16)
    if t == 0.5:
        x = x + by
    policy = student(x, 0.5 * ones)
    if t == 0.4:
        x = rollout(policy, x, 0.5, 0.4, total_substeps=16) + by
    end = rollout(policy, x, t, 0.0, total_substeps=16)
    torch.testing.assert_close(here, end, **TOLERANCE)


def test_gradient_of_training(page, states):
    """By hand in the page, by autograd here; the loss is that of pi_id_loss at the same times."""
    K, power = 8, 1
    x_src = states[0][:1]
    draw = "(() => 0.6)"
    made = page.execute_script(
        f"const start = startTraining(arguments[0], {K}, 10).parameters;"
        "const policy = staticPolicy(start, arguments[0]);"
        f"const queries = queryTeacher(policy, 16, 4, {draw});"
        f"const found = lossAndGradient(start, arguments[0], queries, {power});"
        "return [start, queries.map((q) => q.t), found]",
        x_src[0].tolist(),
    )
    parameters, times, here = made
    flat = torch.tensor(parameters, dtype=torch.float64, requires_grad=True)
    means, logweights, logstd = flat.split([2 * K, K, 1])
    mixture = GaussianMixture(
        means.view(1, K, 2), logstd.view(1, 1, 1), logweights.log_softmax(0).view(1, K, 1)
    )
    uniforms = 1 - torch.tensor([times], dtype=torch.float64), torch.zeros(1, 3)
    out = pi_id_loss(
        GMFlowPolicy(mixture, x_src, 1.0), teacher(), 1.0, 1.0, uniforms=uniforms,
        num_intermediates=4, total_substeps=16, solver="deis",
    )  # fmt: skip
    loss = out.weighted(power)
    loss.backward()
    assert loss > 0.01 and flat.grad.abs().max() > 0.01
    assert here["loss"] == pytest.approx(loss.item(), abs=1e-8)
    gradient = torch.tensor(here["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, flat.grad, atol=1e-7, rtol=0)


# ==== The page itself =============================================================================


def seen(page, expression: str):
    return page.execute_script(f"return {expression}")


def wait_for(page, expression: str) -> None:
    deadline = time.monotonic() + 300
    while not seen(page, expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


def test_every_button(page):
    """Each is pressed once, in a page that has just been opened for it; its switch is then on."""
    count = seen(page, "document.querySelectorAll('button').length")
    assert count >= 35
    for i in range(count):
        button = page.find_elements("css selector", "button")[i]
        if button.get_attribute("data-set") == "solver=exact":
            page.execute_script("setState({ policy: 'dx' })")
        if not button.is_displayed():  # the arrows of narrow screens
            assert button.get_attribute("data-do") in ("previous", "next")
            page.execute_script("arguments[0].click()", button)
            continue
        button.click()
        if button.get_attribute("data-set"):
            assert button.get_attribute("aria-pressed") == "true"
        page.execute_async_script(
            "playing = false; setState(DEFAULTS); requestAnimationFrame(arguments[0])"
        )


def test_a_sentence_begins_untrained(page):
    """The sentences on queries speak of an untrained policy, also after the one that trains."""
    page.execute_script("showSentence(9)")
    wait_for(page, "training.done > 0")
    page.execute_script("showSentence(7)")
    assert seen(page, "training.done") == 0 and seen(page, "scene.error") > 0.5


def test_the_address_keeps_the_state(page):
    text = "policy=dx&nfe=2&substeps=16&solver=deis&noise=1.5,-2&t=0.4&push=0.5,1,0&tool=push"
    page.get(PAGE.as_uri() + "#" + text)
    page.refresh()
    kept = dict(part.split("=") for part in seen(page, "address()").split("#")[1].split("&"))
    assert kept == dict(part.split("=") for part in text.split("&"))
    assert seen(page, "scene.segments.length") == 2
    page.execute_script("setState({ t: '0.2' })")
    wait_for(page, "location.hash.includes('t=0.2')")
    page.execute_script("location.hash = 'policy=other&noise=x&t=7&substeps=-3&solver=euler'")
    wait_for(page, "JSON.stringify(state) === JSON.stringify(DEFAULTS)")


def test_dropping_the_noise_evaluates_the_network_once(page):
    from selenium.webdriver import ActionChains

    page.execute_script(
        "window.calls = 0; const original = evaluateNetwork;"
        "evaluateNetwork = (...given) => { calls += 1; return original(...given); };"
    )
    plane = page.find_element("id", "plane")
    drag = ActionChains(page).move_to_element_with_offset(plane, -100, 40).click_and_hold()
    drag.move_by_offset(30, 50).move_by_offset(40, 20).release().perform()
    assert seen(page, "calls") == 1
    x, y = map(float, seen(page, "state.noise").split(","))
    side = plane.size["width"]
    assert (x, y) == pytest.approx((-30 / side * 5.8, -110 / side * 5.8), abs=0.03)
    wait_for(page, "document.querySelector('#calls b').textContent === '1'")
    assert page.find_element("css selector", "#teacher-calls b").text == "128"
    page.execute_script("setState({ substeps: '4', t: '0.3' })")  # a rollout calls no network
    assert seen(page, "calls") == 1
    page.execute_script("setState({ nfe: '4' })")  # the first of four is known
    assert seen(page, "calls") == 4


def test_keys(page):
    from selenium.webdriver import Keys

    plane = page.find_element("id", "plane")
    before = seen(page, "scene.noise")
    plane.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert seen(page, "scene.noise") == pytest.approx([before[0] + 0.1, before[1] + 0.1])
    plane.send_keys(Keys.SPACE)
    wait_for(page, "Number(state.t) < 1")
    plane.send_keys(Keys.SPACE)
    assert seen(page, "playing") is False


def test_after_a_push_gmflow_answers_and_dx_does_not(page):
    moved = {}
    for policy in ("gmflow", "dx"):
        page.execute_script(f"setState({{ policy: '{policy}', push: '0.5,0,1' }})")
        moved[policy] = seen(page, "rmse(scene.states.at(-1).x, scene.unpushed.at(-1).x)")
    assert moved["dx"] < 0.02 < 0.3 < moved["gmflow"]


def test_a_query_shows_the_gap_that_is_the_loss(page):
    plane = page.find_element("id", "plane")
    page.execute_script("setState({ policy: 'static', tool: 'query' })")
    plane.click()
    assert seen(page, "queries") >= 1
    gap = seen(page, "squaredGap(velocities(Number(state.query)))")
    assert gap > 0
    wait_for(page, f"document.getElementById('says').textContent.includes('{gap:.4f}')")


def test_training_in_the_page(page):
    page.find_element("css selector", "[data-do=train]").click()
    wait_for(page, "training.done === training.iterations")
    losses = seen(page, "training.losses")
    assert len(losses) == 300
    assert sum(losses[-20:]) < 0.02 * sum(losses[:20])
    assert seen(page, "scene.error") < 0.05
    assert page.find_element("id", "loss").is_displayed()
