/* The page around engine.js. DATA holds the network and the test images in base64; nothing of it becomes markup. */
const decode = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const net = parse(decode(DATA.network));
const [HEIGHT, WIDTH, CHANNELS] = net.image;
const examples = DATA.images.map(decode);
const $ = id => document.getElementById(id);
const LEVELS = net.layers.map((layer, index) => levels(layer, net.layers[index + 1])), STEPS = Math.max(...LEVELS);
const state = {
    pixels: new Uint8Array(HEIGHT * WIDTH * CHANNELS), result: null, chosen: [0, 0], pen: [WIDTH >> 1, HEIGHT >> 1],
    step: 0,  // of temporal conversion, from 1 on; 0: all steps together
    loads: 0, // of pictures: a slow one may not replace what was chosen after it
};

window.twta = {
    classify(pixels) {
        if (pixels.length !== state.pixels.length) throw new RangeError(`give ${state.pixels.length} bytes`);
        const {scores, prediction, activations} = run(net, pixels);
        return {scores, prediction, activations};
    },
};

function make(kind, parent, text = '', attributes = {}) {
    const element = document.createElement(kind);
    element.textContent = text;
    Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    return parent.appendChild(element);
}

const number = value => value.toLocaleString('en');
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* Change a text only if it is another: a screen reader says each change. */
function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
}

/* Return the colours of -1, 0 and +1 as [red, green, blue]. */
function palette(names) {
    return names.map(name => [1, 3, 5].map(at => parseInt(colour(name).slice(at, at + 2), 16)));
}

/* The names of the colours of activations: a network of --rest -1 is at rest at -1, which then has the quiet colour. */
const RESTS_BELOW = isFromRest(net);
const ACTIVATIONS = RESTS_BELOW ? ['--zero', '--minus', '--plus'] : ['--minus', '--zero', '--plus'];

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
    paint(canvas, WIDTH, HEIGHT,
          (x, y) => [0, 1, 2].map(c => pixels[(y * WIDTH + x) * CHANNELS + (CHANNELS === 3 ? c : 0)]));
}

/* ---------------------------------------------------------------------------------------------------------------- */
/* What the network makes of it */

/* A number in [0, 1) for an index: the same spikes are deleted while one draws. */
function hash(index) {
    let h = Math.imul(index + 1, 0x9e3779b1);
    h = Math.imul(h ^ h >>> 15, 0x85ebca6b);
    return ((h ^ h >>> 13) >>> 0) / 2 ** 32;
}

let colours;  // of activations and of weights, for this update
let isScheduled = false;
function schedule() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => { isScheduled = false; update(); });
}

const chosenShift = () => Number($('shift').value);

function update() {
    paintPixels($('input'), state.pixels);
    if (CHANNELS === 1 && $('input').matches(':focus-visible')) {
        const context = $('input').getContext('2d');
        context.fillStyle = colour('--plus');
        context.fillRect(...state.pen, 1, 1);
    }
    const noise = $('noise').value / 100, shift = chosenShift(), start = performance.now();
    state.result = run(net, state.pixels, noise ? k => hash(k) < noise : null, shift);
    const taken = performance.now() - start;
    [['noise', ' %'], ['shift', '']].forEach(([id, unit]) => {
        write($(`${id}-value`), $(id).value + unit);
        $(id).setAttribute('aria-valuetext', $(id).value + unit);
    });
    showStep();
    showScores();
    showCounts(taken);
    colours = {activations: palette(ACTIVATIONS), weights: palette(['--minus', '--zero', '--plus'])};
    net.layers.forEach((layer, index) => showMaps(index));
    if (!$('filter').hidden) showFilter();
}

function showScores() {
    const {scores, prediction} = state.result;
    const powers = scores.map(score => Math.exp(score - scores[prediction]));
    const total = powers.reduce((a, b) => a + b, 0);
    const isBlank = CHANNELS === 1 && state.pixels.every(value => !value);
    write($('answer'), isBlank ? 'nothing drawn' : `class: ${net.classes[prediction]}`);
    [...$('scores').rows].forEach((row, k) => {
        row.className = k === prediction && !isBlank ? 'best' : '';
        row.querySelector('.bar').style.width = `${100 * powers[k] / total}%`;
        row.lastChild.textContent = scores[k].toFixed(2);
    });
}

/* Return a layer's spikes in the chosen step of temporal conversion, in which each level of a neuron has a step. */
function firing(index) {
    const all = state.result.activations[index], {filters, groups} = net.layers[index], share = filters / groups;
    if (!state.step) return all;
    const neurons = share / LEVELS[index], first = neurons * (state.step - 1);  // filters of a group, by level
    return all.map((value, k) => {
        const place = k % filters % share - first;
        return place >= 0 && place < neurons ? value : 0;
    });
}

function showStep() {
    write($('step'), state.step ? `step ${state.step} of ${STEPS}` : 'all steps together');
}

function showCounts(taken) {
    const {counts} = state.result;
    let additions = 0, products = 0;
    [...$('counts').tBodies[0].rows].forEach((row, k) => {
        const count = counts[k];
        const spikes = firing(k).reduce((sum, value) => sum + (RESTS_BELOW ? value + 1 : Math.abs(value)), 0);
        const neurons = count.neurons * (RESTS_BELOW ? 2 : 1) / (state.step ? LEVELS[k] : 1);
        const cells = [number(spikes), `${(100 * spikes / neurons).toFixed(0)} %`];
        cells.push(...(k ? [number(count.additions), number(count.products - count.additions)] : ['real numbers', '']));
        cells.forEach((text, at) => { row.cells[at + 1].textContent = text; });
        if (k) { additions += count.additions; products += count.products; }
    });
    $('cost').textContent = `${number(additions)} additions in the ternary layers, where the network in float32 needs `
        + `${number(products)} multiplications and additions. ${number(DATA.bytes)} bytes. `
        + `${taken.toFixed(0)} ms here.`;
}

/* Maps side by side, one per filter, with a pixel around each. */
function grid(layer) {
    const cell = [layer.outWidth + 1, layer.outHeight + 1];
    const columns = Math.max(1, Math.min(layer.filters, Math.sqrt(layer.filters * 3.2 * cell[1] / cell[0]) | 0));
    return {cell, columns, rows: Math.ceil(layer.filters / columns)};
}

function showMaps(index) {
    const layer = net.layers[index], {cell, columns, rows} = grid(layer);
    const fired = firing(index), canvas = $(`map-${index}`);
    paint(canvas, columns * cell[0] + 1, rows * cell[1] + 1, (x, y) => {
        const f = Math.floor((y - 1) / cell[1]) * columns + Math.floor((x - 1) / cell[0]);
        const column = x % cell[0] - 1, row = y % cell[1] - 1;
        if (f >= layer.filters || column < 0 || row < 0) return null;
        return colours.activations[fired[(row * layer.outWidth + column) * layer.filters + f] + 1];
    });
    const [at, chosen] = state.chosen;
    if (at === index && !$('filter').hidden) {
        const context = canvas.getContext('2d');
        context.strokeStyle = colour('--focus');
        context.strokeRect(chosen % columns * cell[0] + .5, Math.floor(chosen / columns) * cell[1] + .5, ...cell);
    }
}

function showFilter() {
    const [index, f] = state.chosen, layer = net.layers[index], sums = state.result.sums[index];
    const own = Array.from({length: sums.length / layer.filters}, (_, k) => sums[k * layer.filters + f]);
    const [upper, lower] = thresholds(layer, f, index ? chosenShift() : 0);
    const show = value => index ? String(value) : value.toPrecision(4);
    write($('filter-title'), `${layer.name}, filter ${f + 1} of ${layer.filters}`);
    write($('filter-text'), `It is ${rule(upper, lower, show)} `
        + `Here its sums go from ${show(least(own))} to ${show(most(own))}.`);
    showWeights(layer, f);
    drawHistogram(own, upper, lower, show, index > 0);
}

const least = values => values.reduce((a, b) => Math.min(a, b));
const most = values => values.reduce((a, b) => Math.max(a, b));

/* Say when a filter with these thresholds fires. */
function rule(upper, lower, show) {
    if (upper === -Infinity) return 'always +1.';
    if (lower === Infinity) return 'always -1.';
    const parts = Number.isFinite(upper) ? [`+1 where its sum is at least ${show(upper)}`] : [];
    if (Number.isFinite(lower)) parts.push(`-1 where its sum is at most ${show(lower)}`);
    return parts.length ? `${parts.join(', ')}, else 0.` : 'always 0.';
}

function showWeights(layer, f) {
    const [rows, columns] = layer.kernel, shown = Math.min(layer.perGroup, 256), wide = Math.ceil(Math.sqrt(shown));
    const own = layer.weights.slice(f * layer.fanIn, (f + 1) * layer.fanIn);
    const largest = own.reduce((largest, w) => Math.max(largest, Math.abs(w)), 0) || 1;
    paint($('filter-weights'), wide * (columns + 1), Math.ceil(shown / wide) * (rows + 1), (x, y) => {
        const c = Math.floor(y / (rows + 1)) * wide + Math.floor(x / (columns + 1));
        const column = x % (columns + 1), row = y % (rows + 1);
        if (c >= shown || column === columns || row === rows) return null;
        const w = own[(row * columns + column) * layer.perGroup + c] / largest, end = colours.weights[w < 0 ? 0 : 2];
        return colours.weights[1].map((zero, k) => zero + (end[k] - zero) * Math.abs(w));
    });
}

/* Draw how often each sum occurs, in the colours of the activations, and the thresholds between them. */
function drawHistogram(values, upper, lower, show, isWhole) {
    const canvas = $('filter-sums'), context = canvas.getContext('2d'), {width} = canvas, height = canvas.height - 16;
    const marks = isWhole ? [upper - .5, lower + .5] : [upper, lower];  // whole sums lie on both sides of a mark
    const shown = [...values, ...marks.filter(Number.isFinite)];
    let size = (most(shown) - least(shown)) / 62 || 1;
    if (isWhole) size = Math.ceil(size);
    const start = isWhole ? Math.floor(least(shown)) - .5 : least(shown) - size;
    const x = value => (value - start) / size / 64 * width, bins = new Array(64).fill(0);
    values.forEach(value => { bins[Math.min(63, Math.floor((value - start) / size))]++; });
    const top = most(bins);
    context.clearRect(0, 0, width, canvas.height);
    bins.forEach((count, k) => {
        const middle = start + (k + .5) * size, place = middle >= marks[0] ? 2 : middle <= marks[1] ? 0 : 1;
        context.fillStyle = ACTIVATIONS[place] === '--zero' ? colour('--line') : colour(ACTIVATIONS[place]);
        const tall = count / top * (height - 4);
        context.fillRect(k / 64 * width, height - tall, width / 64 - 1, tall);
    });
    context.fillStyle = context.strokeStyle = colour('--ink');
    marks.filter(Number.isFinite).forEach(mark => {
        context.beginPath();
        context.moveTo(x(mark), 0);
        context.lineTo(x(mark), height);
        context.stroke();
    });
    context.font = '12px system-ui, sans-serif';
    [least(values), most(values)].forEach((value, end) => {
        const text = show(value), room = width - context.measureText(text).width;
        context.fillText(text, Math.min(room, Math.max(0, x(value) - (end ? 20 : 0))), height + 14);
    });
    canvas.setAttribute('aria-label', `histogram of the sums, from ${show(least(values))} to ${show(most(values))}`);
}

/* ---------------------------------------------------------------------------------------------------------------- */

function setUpLayers() {
    net.layers.forEach((layer, index) => {
        const row = make('tr', $('counts').tBodies[0]);
        make('td', row, layer.name);
        for (let k = 0; k < 4; k++) make('td', row);
        make('h3', $('layers'), `${layer.name}: ${layer.filters} maps of ${layer.outHeight} × ${layer.outWidth}`);
        const canvas = make('canvas', make('div', $('layers'), '', {class: 'maps'}), '', {
            id: `map-${index}`, tabindex: 0, role: 'application', 'aria-label': `activations of ${layer.name}`,
            'aria-describedby': 'maps-help'});
        setUpMaps(canvas, layer, index);
    });
    const longest = Math.max(...net.classes.map(name => name.length));
    net.classes.forEach(name => {
        const row = make('tr', $('scores').tBodies[0]);
        make('th', row, name, {scope: 'row'}).style.width = `${.6 * Math.min(longest, 12) + 1}rem`;
        make('div', make('td', row), '', {class: 'bar'});
        make('td', row, '', {class: 'number'});
    });
}

/* Let mouse and keyboard choose a layer's filter. */
function setUpMaps(canvas, layer, index) {
    const {cell, columns} = grid(layer), width = columns * cell[0] + 1;
    canvas.style.width = `${width * Math.max(2, Math.min(6, Math.floor(640 / width)))}px`;
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
        const x = (event.clientX - box.left) / box.width * canvas.width - 1;
        const y = (event.clientY - box.top) / box.height * canvas.height - 1;
        choose(Math.max(0, Math.floor(y / cell[1])) * columns + Math.max(0, Math.floor(x / cell[0])));
    });
    canvas.addEventListener('keydown', event => {
        const isOpen = state.chosen[0] === index && !$('filter').hidden;
        const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Enter: 0, ' ': 0}[event.key];
        if (step === undefined) return;
        event.preventDefault();
        choose(isOpen ? state.chosen[1] + step : 0);
    });
}

function closeFilter() {
    $('filter').hidden = true;
    showMaps(state.chosen[0]);
}

$('title').textContent = `${net.network}: a network of -1, 0 and +1`;
$('about').textContent = 'The network runs in this page, exactly. Weights and activations of its inner layers are '
    + '-1, 0 or +1, so they add and subtract, and never multiply. Nothing is sent anywhere.';
if (RESTS_BELOW) $('counted').textContent = 'spikes from rest';
[['Weights:', ['--minus', '--zero', '--plus']], ['Activations:', ACTIVATIONS]].forEach(([what, names]) => {
    make('b', $('key'), ` ${what}`);
    names.forEach((name, k) => {
        make('span', $('key')).style.background = `var(${name})`;
        $('key').append(['-1', '0', '+1'][k]);
    });
});
setUpLayers();
setUpInput();
$('close').addEventListener('click', closeFilter);
document.addEventListener('keydown', event => { if (event.key === 'Escape') closeFilter(); });
$('steps').hidden = STEPS === 1;
$('next').addEventListener('click', () => { state.step = (state.step + 1) % (STEPS + 1); update(); });
['noise', 'shift'].forEach(id => $(id).addEventListener('input', schedule));
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', update);
update();
