/* The page around engine.js. DATA holds the network and the test images in base64; nothing of it becomes markup. */
'use strict';

const decode = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const net = parse(decode(DATA.network));
const [HEIGHT, WIDTH, CHANNELS] = net.image;
const examples = DATA.images.map(decode);
const $ = id => document.getElementById(id);
const LEVELS = net.layers.map((layer, index) => levels(layer, net.layers[index + 1])), STEPS = Math.max(...LEVELS);
const state = {pixels: new Uint8Array(HEIGHT * WIDTH * CHANNELS), result: null, chosen: [0, 0], pen: [WIDTH >> 1, HEIGHT >> 1],
               step: 0};  // of temporal conversion, from 1 on; 0: all steps together

window.twta = {classify: pixels => { const {scores, prediction, activations} = run(net, pixels); return {scores, prediction, activations}; }};

function make(kind, parent, text = '', attributes = {}) {
    const element = document.createElement(kind);
    element.textContent = text;
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    return parent.appendChild(element);
}

const number = value => value.toLocaleString('en');
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* Return the colours of -1, 0 and +1 as [red, green, blue]. */
function palette(names = ['--minus', '--zero', '--plus']) {
    return names.map(name => [1, 3, 5].map(at => parseInt(colour(name).slice(at, at + 2), 16)));
}

/* The names of the colours of activations: a network of --rest -1 is at rest at -1, which then has the quiet colour. */
const ACTIVATIONS = net.layers.some(layer => layer.border === -1) ? ['--zero', '--minus', '--plus']
    : ['--minus', '--zero', '--plus'];

function paint(canvas, width, height, pixel) {
    canvas.width = width;
    canvas.height = height;
    const image = new ImageData(width, height);
    for (let y = 0, k = 0; y < height; y++) {
        for (let x = 0; x < width; x++, k += 4) {
            const rgb = pixel(x, y);
            if (rgb) image.data.set([...rgb, 255], k);
        }
    }
    canvas.getContext('2d').putImageData(image, 0, 0);
}

function paintPixels(canvas, pixels) {
    paint(canvas, WIDTH, HEIGHT, (x, y) => [0, 1, 2].map(c => pixels[(y * WIDTH + x) * CHANNELS + (CHANNELS === 3 ? c : 0)]));
}

/* ---------------------------------------------------------------------------------------------------------------- */
/* The input: drawn, chosen or one's own */

function setUpInput() {
    const canvas = $('input'), canDraw = CHANNELS === 1;
    $('input-title').textContent = canDraw ? 'Draw a digit' : 'An image';
    $('input-help').textContent = canDraw ? 'With mouse or finger; by keyboard: arrow keys move, with Shift they draw.'
        : 'Choose a test image or a picture of your own.';
    const clear = make('button', $('tools'), canDraw ? 'Clear' : 'Black');
    clear.addEventListener('click', () => { state.pixels.fill(0); update(); });
    const label = make('label', $('tools'), 'own picture: ');
    const file = make('input', label, '', {type: 'file', accept: 'image/*'});
    file.addEventListener('change', () => file.files[0] && load(file.files[0]));
    examples.forEach((pixels, index) => {
        const button = make('button', $('examples'), '', {class: 'picture', 'aria-label': `test image ${index + 1}`});
        paintPixels(make('canvas', button), pixels);
        button.addEventListener('click', () => { state.pixels.set(pixels); update(); });
    });
    if (examples.length) state.pixels.set(examples[0]);
    if (!canDraw) return;
    let last = null;
    const place = event => {
        const box = canvas.getBoundingClientRect();
        return [(event.clientX - box.left) / box.width * WIDTH, (event.clientY - box.top) / box.height * HEIGHT];
    };
    canvas.addEventListener('pointerdown', event => {
        canvas.setPointerCapture(event.pointerId);
        last = place(event);
        stroke(last, last);
    });
    canvas.addEventListener('pointermove', event => {
        if (!last) return;
        const to = place(event);
        stroke(last, to);
        last = to;
    });
    ['pointerup', 'pointercancel'].forEach(kind => canvas.addEventListener(kind, () => { last = null; }));
    canvas.addEventListener('keydown', event => {
        const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
        if (!step) return;
        event.preventDefault();
        const from = state.pen;
        state.pen = [Math.min(WIDTH - 1, Math.max(0, from[0] + step[0])), Math.min(HEIGHT - 1, Math.max(0, from[1] + step[1]))];
        if (event.shiftKey) stroke(from.map(v => v + .5), state.pen.map(v => v + .5)); else schedule();
    });
}

/* Draw a round stroke of about two pixels, as MNIST's digits have it. */
function stroke(from, to) {
    const steps = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) * 2) + 1;
    for (let s = 0; s <= steps; s++) {
        const [x, y] = [0, 1].map(k => from[k] + (to[k] - from[k]) * s / steps);
        for (let row = Math.max(0, Math.floor(y - 2)); row <= Math.min(HEIGHT - 1, y + 2); row++) {
            for (let column = Math.max(0, Math.floor(x - 2)); column <= Math.min(WIDTH - 1, x + 2); column++) {
                const ink = 255 * Math.min(1, Math.max(0, 1.75 - Math.hypot(column + .5 - x, row + .5 - y)));
                const k = row * WIDTH + column;
                state.pixels[k] = Math.max(state.pixels[k], ink);
            }
        }
    }
    schedule();
}

/* Take a picture of the user's: cut to the network's proportions about its centre, resized, grey if need be. */
async function load(file) {
    let picture;
    try { picture = await createImageBitmap(file); } catch { $('answer').textContent = 'This is no picture that can be read.'; return; }
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [WIDTH, HEIGHT];
    const context = canvas.getContext('2d');
    const scale = Math.max(WIDTH / picture.width, HEIGHT / picture.height);
    context.imageSmoothingQuality = 'high';
    context.drawImage(picture, (WIDTH - picture.width * scale) / 2, (HEIGHT - picture.height * scale) / 2,
                      picture.width * scale, picture.height * scale);
    const {data} = context.getImageData(0, 0, WIDTH, HEIGHT);
    for (let k = 0; k < WIDTH * HEIGHT; k++) {
        const [r, g, b] = data.subarray(4 * k, 4 * k + 3);
        if (CHANNELS === 1) state.pixels[k] = Math.round(.299 * r + .587 * g + .114 * b);
        else state.pixels.set([r, g, b], 3 * k);
    }
    update();
}

/* ---------------------------------------------------------------------------------------------------------------- */
/* What the network makes of it */

/* A number in [0, 1) for an index: the same spikes are deleted while one draws. */
function hash(index) {
    let h = Math.imul(index + 1, 0x9e3779b1);
    h = Math.imul(h ^ h >>> 15, 0x85ebca6b);
    return ((h ^ h >>> 13) >>> 0) / 2 ** 32;
}

let isScheduled = false;
function schedule() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => { isScheduled = false; update(); });
}

function update() {
    paintPixels($('input'), state.pixels);
    if (CHANNELS === 1 && document.activeElement === $('input')) {
        const context = $('input').getContext('2d');
        context.fillStyle = colour('--plus');
        context.fillRect(...state.pen, 1, 1);
    }
    const noise = $('noise').value / 100, shift = Number($('shift').value), start = performance.now();
    state.result = run(net, state.pixels, noise ? k => hash(k) < noise : null, shift);
    const taken = performance.now() - start;
    $('noise-value').textContent = `${$('noise').value} %`;
    $('shift-value').textContent = String(shift);
    showStep();
    showScores();
    showCounts(taken);
    net.layers.forEach((layer, index) => showMaps(index));
    if (!$('filter').hidden) showFilter();
}

function showScores() {
    const {scores, prediction} = state.result;
    const powers = scores.map(score => Math.exp(score - scores[prediction]));
    const total = powers.reduce((a, b) => a + b, 0);
    $('answer').textContent = `class: ${net.classes[prediction]}`;
    [...$('scores').rows].forEach((row, k) => {
        row.className = k === prediction ? 'best' : '';
        row.querySelector('.bar').style.width = `${100 * powers[k] / total}%`;
        row.cells[2].textContent = scores[k].toFixed(2);
    });
}

/* Return a layer's spikes in the chosen step of temporal conversion, in which each level of a neuron has a step. */
function firing(index) {
    const all = state.result.activations[index], {filters, groups} = net.layers[index], share = filters / groups;
    if (!state.step) return all;
    return all.map((value, k) => Math.floor(k % filters % share / (share / LEVELS[index])) === state.step - 1 ? value : 0);
}

function showStep() {
    $('step').textContent = state.step ? `step ${state.step} of ${STEPS}: maps and spikes are those of this step`
        : 'all steps together';
}

function showCounts(taken) {
    const {counts} = state.result;
    let additions = 0, products = 0;
    [...$('counts').tBodies[0].rows].forEach((row, k) => {
        const count = counts[k];
        const spikes = state.step ? firing(k).reduce((sum, value) => sum + Math.abs(value), 0) : count.spikes;
        const cells = [number(spikes), `${(100 * spikes / count.neurons * (state.step ? LEVELS[k] : 1)).toFixed(0)} %`];
        cells.push(...(k ? [number(count.additions), number(count.products - count.additions)] : ['real numbers', '']));
        cells.forEach((text, at) => { row.cells[at + 1].textContent = text; });
        if (k) { additions += count.additions; products += count.products; }
    });
    $('cost').textContent = `${number(additions)} additions in the ternary layers, where the network in float32 needs `
        + `${number(products)} multiplications and additions. ${number(DATA.bytes)} bytes. ${taken.toFixed(0)} ms here.`;
}

/* Maps side by side, one per filter, a pixel between them. */
function grid(layer) {
    const cell = [layer.outWidth + 1, layer.outHeight + 1];
    const columns = Math.max(1, Math.min(layer.filters, Math.floor(Math.sqrt(layer.filters * 3.2 * cell[1] / cell[0]))));
    return {cell, columns, rows: Math.ceil(layer.filters / columns)};
}

function showMaps(index) {
    const layer = net.layers[index], fired = firing(index), colours = palette(ACTIVATIONS);
    const {cell, columns, rows} = grid(layer), canvas = $(`map-${index}`);
    const [at, chosen] = state.chosen, mark = colour('--focus');
    paint(canvas, columns * cell[0], rows * cell[1], (x, y) => {
        const f = Math.floor(y / cell[1]) * columns + Math.floor(x / cell[0]), z = x % cell[0], row = y % cell[1];
        if (f >= layer.filters || z === layer.outWidth || row === layer.outHeight) return null;
        return colours[fired[(row * layer.outWidth + z) * layer.filters + f] + 1];
    });
    if (at === index && !$('filter').hidden) {
        const context = canvas.getContext('2d');
        context.strokeStyle = mark;
        context.strokeRect(chosen % columns * cell[0] - .5, Math.floor(chosen / columns) * cell[1] - .5, ...cell);
    }
}

function showFilter() {
    const [index, f] = state.chosen, layer = net.layers[index], sums = state.result.sums[index];
    const own = Array.from({length: sums.length / layer.filters}, (_, k) => sums[k * layer.filters + f]);
    const show = value => index ? String(value) : value.toPrecision(4), largestSum = index ? layer.fanIn : Number.MAX_VALUE;
    const upper = layer.upper[f] > largestSum ? Infinity : layer.upper[f], lower = layer.lower[f] < -largestSum ? -Infinity : layer.lower[f];
    const rules = [[upper, `+1 where its sum is at least ${show(upper)}`], [lower, `-1 where its sum is at most ${show(lower)}`]];
    $('filter-title').textContent = `${layer.name}, filter ${f + 1} of ${layer.filters}`;
    $('filter-text').textContent = `It is ${rules.filter(rule => Number.isFinite(rule[0])).map(rule => `${rule[1]}, `).join('')}else 0. `
        + `Here its sums go from ${show(Math.min(...own))} to ${show(Math.max(...own))}.`;
    const [rows, columns] = layer.kernel, shown = Math.min(layer.perGroup, 256), wide = Math.ceil(Math.sqrt(shown)), colours = palette();
    const largest = index ? 1 : Math.max(...Array.from({length: layer.fanIn}, (_, k) => Math.abs(layer.weights[f * layer.fanIn + k])));
    paint($('filter-weights'), wide * (columns + 1), Math.ceil(shown / wide) * (rows + 1), (x, y) => {
        const c = Math.floor(y / (rows + 1)) * wide + Math.floor(x / (columns + 1)), j = x % (columns + 1), i = y % (rows + 1);
        if (c >= shown || j === columns || i === rows) return null;
        const w = layer.weights[((f * rows + i) * columns + j) * layer.perGroup + c] / largest;
        return colours[1].map((zero, k) => zero + (colours[w < 0 ? 0 : 2][k] - zero) * Math.abs(w));
    });
    drawHistogram(own, [lower, upper].map((t, k) => t + (index ? Number($('shift').value) + (k ? -.5 : .5) : 0)));
}

function drawHistogram(values, thresholds) {
    const canvas = $('filter-sums'), context = canvas.getContext('2d'), {width, height} = canvas;
    const finite = [...values, ...thresholds.filter(Number.isFinite)];
    const least = Math.min(...finite) - 1, most = Math.max(...finite) + 1, bins = new Array(64).fill(0);
    values.forEach(value => { bins[Math.min(63, Math.floor((value - least) / (most - least) * 64))]++; });
    const top = Math.max(...bins), x = value => (value - least) / (most - least) * width;
    context.clearRect(0, 0, width, height);
    bins.forEach((count, k) => {
        const middle = least + (k + .5) / 64 * (most - least);
        context.fillStyle = middle >= thresholds[1] ? colour('--plus') : middle <= thresholds[0] ? colour('--minus') : colour('--line');
        context.fillRect(k / 64 * width, height - count / top * (height - 4), width / 64 - 1, count / top * (height - 4));
    });
    context.strokeStyle = colour('--ink');
    thresholds.filter(Number.isFinite).forEach(value => {
        context.beginPath();
        context.moveTo(x(value), 0);
        context.lineTo(x(value), height);
        context.stroke();
    });
}

/* ---------------------------------------------------------------------------------------------------------------- */

function setUpLayers() {
    net.layers.forEach((layer, index) => {
        const row = make('tr', $('counts').tBodies[0]);
        make('td', row, layer.name);
        for (let k = 0; k < 4; k++) make('td', row);
        make('h2', $('layers'), `${layer.name}: ${layer.filters} maps of ${layer.outHeight} × ${layer.outWidth}`);
        const box = make('div', $('layers'), '', {class: 'maps'});
        const canvas = make('canvas', box, '', {id: `map-${index}`, tabindex: 0, role: 'img',
                                                'aria-label': `activations of ${layer.name}`});
        const {cell, columns} = grid(layer);
        canvas.style.width = `${columns * cell[0] * Math.max(2, Math.min(6, Math.floor(640 / (columns * cell[0]))))}px`;
        const choose = f => {
            if (f < 0 || f >= layer.filters) return;
            const before = state.chosen[0];
            state.chosen = [index, f];
            $('filter').hidden = false;
            [before, index].forEach(showMaps);
            showFilter();
        };
        canvas.addEventListener('click', event => {
            const box = canvas.getBoundingClientRect();
            const [x, y] = [(event.clientX - box.left) / box.width * canvas.width, (event.clientY - box.top) / box.height * canvas.height];
            choose(Math.floor(y / cell[1]) * columns + Math.floor(x / cell[0]));
        });
        canvas.addEventListener('keydown', event => {
            const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
            if (!step) return;
            event.preventDefault();
            choose(state.chosen[0] === index && !$('filter').hidden ? state.chosen[1] + step : 0);
        });
    });
    net.classes.forEach(name => {
        const row = make('tr', $('scores').tBodies[0]);
        make('td', row, name, {class: 'name'});
        make('div', make('td', row), '', {class: 'bar'});
        make('td', row, '', {class: 'number'});
    });
}

$('title').textContent = `${net.network}: a network of -1, 0 and +1`;
$('about').textContent = 'The network runs in this page, exactly as on the chip: weights and activations of its inner layers are '
    + '-1, 0 or +1, so they add and subtract, and never multiply. Nothing is sent anywhere.';
[['Weights:', ['--minus', '--zero', '--plus']], ['Activations:', ACTIVATIONS]].forEach(([what, names]) => {
    make('b', $('key'), ` ${what}`);
    names.forEach((name, k) => {
        make('span', $('key')).style.background = `var(${name})`;
        $('key').append(['-1', '0', '+1'][k]);
    });
});
setUpLayers();
setUpInput();
$('steps').hidden = STEPS === 1;
$('next').addEventListener('click', () => { state.step = (state.step + 1) % (STEPS + 1); update(); });
['noise', 'shift'].forEach(id => $(id).addEventListener('input', schedule));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', update);
update();
