/* The input of the page: drawn, chosen or one's own picture. `state`, `update` and `schedule` are those of page.js. */
const ACCEPTED = 'image/png, image/jpeg, image/webp, image/gif, image/bmp';  // what every browser decodes

function setUpInput() {
    const canvas = $('input'), canDraw = CHANNELS === 1;
    $('input-title').textContent = canDraw ? 'Draw a digit' : 'An image';
    $('input-help').textContent = canDraw ? 'With mouse or finger; by keyboard: arrow keys move, with Shift they draw.'
        : 'Choose a test image or a picture of your own.';
    const choose = pixels => {
        state.loads++;
        $('note').textContent = '';
        state.pixels.set(pixels);
        update();
    };
    const clear = make('button', $('tools'), canDraw ? 'Clear' : 'Black');
    clear.addEventListener('click', () => choose(new Uint8Array(state.pixels.length)));
    if (CHANNELS === 1 || CHANNELS === 3) setUpPicture();
    examples.forEach((pixels, index) => {
        const button = make('button', $('examples'), '', {class: 'picture', 'aria-label': `test image ${index + 1}`});
        paintPixels(make('canvas', button), pixels);
        button.addEventListener('click', () => choose(pixels));
    });
    if (examples.length) state.pixels.set(examples[0]);
    if (canDraw) setUpDrawing(canvas);
}

function setUpPicture() {
    const label = make('label', $('tools'), 'own picture: ');
    const file = make('input', label, '', {type: 'file', accept: ACCEPTED});
    file.addEventListener('change', () => {
        if (file.files[0]) load(file.files[0]);
        file.value = '';  // so that the same file can be chosen again
    });
}

function setUpDrawing(canvas) {
    let last = null, pointer = null;
    const place = event => {
        const box = canvas.getBoundingClientRect();
        return [(event.clientX - box.left) / box.width * WIDTH, (event.clientY - box.top) / box.height * HEIGHT];
    };
    canvas.addEventListener('pointerdown', event => {
        if (!event.isPrimary || event.button) return;
        pointer = event.pointerId;
        canvas.setPointerCapture(pointer);
        last = place(event);
        stroke(last, last);
    });
    canvas.addEventListener('pointermove', event => {
        if (event.pointerId !== pointer) return;
        const to = place(event);
        stroke(last, to);
        last = to;
    });
    ['pointerup', 'pointercancel'].forEach(kind => canvas.addEventListener(kind, event => {
        if (event.pointerId === pointer) pointer = null;
    }));
    ['focus', 'blur'].forEach(kind => canvas.addEventListener(kind, schedule));
    canvas.addEventListener('keydown', event => {
        const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
        if (!step) return;
        event.preventDefault();
        const from = state.pen, last = [WIDTH - 1, HEIGHT - 1];
        state.pen = from.map((value, axis) => Math.min(last[axis], Math.max(0, value + step[axis])));
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

/* Take a picture of the user's: cut to the network's proportions about its centre, resized, on white; if need be grey,
   and inverted if its border is bright, as digits are white on black. */
async function load(file) {
    const number = ++state.loads;
    let picture;
    try {
        picture = await createImageBitmap(file);
    } catch {
        $('note').textContent = `${file.name} is no picture that can be read.`;
        return;
    }
    if (number !== state.loads) return;
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [WIDTH, HEIGHT];
    const context = canvas.getContext('2d'), scale = Math.max(WIDTH / picture.width, HEIGHT / picture.height);
    const [width, height] = [picture.width * scale, picture.height * scale];
    context.fillStyle = '#fff';
    context.fillRect(0, 0, WIDTH, HEIGHT);
    context.imageSmoothingQuality = 'high';
    context.drawImage(picture, (WIDTH - width) / 2, (HEIGHT - height) / 2, width, height);
    picture.close();
    const {data} = context.getImageData(0, 0, WIDTH, HEIGHT);
    for (let k = 0; k < WIDTH * HEIGHT; k++) {
        const [r, g, b] = data.subarray(4 * k, 4 * k + 3);
        if (CHANNELS === 1) state.pixels[k] = Math.round(.299 * r + .587 * g + .114 * b);
        else state.pixels.set([r, g, b], 3 * k);
    }
    const isBright = CHANNELS === 1 && borderMean(state.pixels) >= 128;
    if (isBright) state.pixels.forEach((value, k) => { state.pixels[k] = 255 - value; });
    $('note').textContent = isBright ? `${file.name}, inverted: digits are white on black here.` : file.name;
    update();
}

function borderMean(pixels) {
    const border = pixels.filter((_, k) => k < WIDTH || k >= WIDTH * (HEIGHT - 1) || k % WIDTH % (WIDTH - 1) === 0);
    return border.reduce((sum, value) => sum + value, 0) / border.length;
}
