/* The network of a .twta file, run as twta/packed/numpy_engine.py says; docs/deployment.md describes the file.

   Activations are -1, 0, +1. Ternary sums are counted in bit planes of 32 channels per word: with m, the bits where
   weight and activation are both not 0, and x, those of m where their signs differ, a sum is |m| - 2 |x|. */
'use strict';

class Reader {
    constructor(bytes) {
        this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
        this.at = 0;
    }

    numbers(kind, count) {
        const [Type, size, read] = {
            f4: [Float32Array, 4, 'getFloat32'], f8: [Float64Array, 8, 'getFloat64'], i2: [Int32Array, 2, 'getInt16'],
            i4: [Int32Array, 4, 'getInt32'], u1: [Uint8Array, 1, 'getUint8'],
        }[kind];
        const found = new Type(count);
        for (let i = 0; i < count; i++, this.at += size) found[i] = this.view[read](this.at, true);
        return found;
    }

    trits(count) {
        const found = new Int8Array(count), powers = [1, 3, 9, 27, 81];
        for (let i = 0; i < count; i++) {
            found[i] = Math.floor(this.view.getUint8(this.at + Math.floor(i / 5)) / powers[i % 5]) % 3 - 1;
        }
        this.at += Math.ceil(count / 5);
        return found;
    }
}

/* Return the network in the bytes of a .twta file, which export has checked. */
function parse(bytes) {
    const reader = new Reader(bytes);
    reader.at = 8;
    const length = reader.view.getUint32(reader.at, true);
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(12, 12 + length)));
    reader.at = 12 + length;
    const net = {...header};
    let [height, width, channels] = header.image;
    if (header.crop) height = width = header.crop;
    if (header.stem) {
        const [rows, columns] = header.stem.kernel, filters = header.stem.filters;
        net.stem = {name: 'stem', kernel: [rows, columns], filters, stride: 1, padding: 'SAME', groups: 1, border: 0,
                    weights: reader.numbers('f4', filters * rows * columns * channels),
                    scale: reader.numbers('f8', filters), shift: reader.numbers('f8', filters)};
        place(net.stem, height, width, channels);
        channels = filters;
    }
    net.layers = header.layers.map((entry, index) => {
        const layer = {border: 0, ...entry};
        place(layer, height, width, channels);
        const count = layer.fanIn * layer.filters, small = layer.fanIn < 32767 ? 'i2' : 'i4';
        layer.weights = index ? reader.trits(count) : reader.numbers('f4', count);
        layer.upper = reader.numbers(index ? small : 'f4', layer.filters);
        layer.lower = reader.numbers(index ? small : 'f4', layer.filters);
        layer.reach = index ? layer.fanIn : Number.MAX_VALUE;  // no sum is larger
        if (index) packWeights(layer);
        [height, width, channels] = [layer.outHeight, layer.outWidth, layer.filters];
        return layer;
    });
    const classes = header.classes.length;
    net.weights = reader.numbers('f4', height * width * channels * classes);
    net.scale = reader.numbers('f4', classes);
    net.shift = reader.numbers('f4', classes);
    return net;
}

/* Give a layer the sizes of its input and output, and of the padded input: before (top, left) and in all. */
function place(layer, height, width, channels) {
    const along = (size, kernel) => {
        const out = layer.padding === 'SAME' ? Math.ceil(size / layer.stride)
            : Math.floor((size - kernel) / layer.stride) + 1;
        const total = Math.max((out - 1) * layer.stride + kernel - size, 0);
        const before = layer.padding === 'SAME' ? total >> 1 : 0;
        return [out, before, Math.max(before + size, (out - 1) * layer.stride + kernel)];
    };
    Object.assign(layer, {height, width, channels});
    [layer.outHeight, layer.top, layer.paddedHeight] = along(height, layer.kernel[0]);
    [layer.outWidth, layer.left, layer.paddedWidth] = along(width, layer.kernel[1]);
    layer.perGroup = channels / layer.groups;
    layer.fanIn = layer.kernel[0] * layer.kernel[1] * layer.perGroup;
    layer.words = Math.ceil(layer.perGroup / 32);
}

/* Return the levels of a layer's activations: so many filters in turn have the same weights, and none fires negatively.

   Export makes such filters by group, and in a group by level. What a maximum reads has one level. */
function levels(layer, next) {
    const share = layer.filters / layer.groups, {fanIn, weights} = layer;
    if (next && next.perGroup === 1 && next.groups === layer.filters) return 1;
    if (layer.lower.some(value => value >= -fanIn)) return 1;
    const repeats = count => {
        const period = share / count * fanIn;
        return weights.every((w, k) => k % (share * fanIn) < period || w === weights[k - period]);
    };
    for (let count = share; count > 1; count--) {
        if (share % count === 0 && repeats(count)) return count;
    }
    return 1;
}

/* Give a ternary layer its weights as bits, [filter][row][column][word]: where they are not 0, and where negative. */
function packWeights(layer) {
    const cells = layer.filters * layer.kernel[0] * layer.kernel[1];
    layer.nonzero = new Uint32Array(cells * layer.words);
    layer.negative = new Uint32Array(cells * layer.words);
    for (let cell = 0, k = 0; cell < cells; cell++) {
        for (let c = 0; c < layer.perGroup; c++, k++) {
            const word = cell * layer.words + (c >> 5), bit = 1 << (c & 31);
            if (layer.weights[k]) layer.nonzero[word] |= bit;
            if (layer.weights[k] < 0) layer.negative[word] |= bit;
        }
    }
}

/* Return an image as the encoder's graph prepares it: pixels / 256, or the central crop, standardised. */
function prepare(pixels, net) {
    const [height, width, channels] = net.image;
    if (!net.crop) return Float64Array.from(pixels, value => value / 256);
    const found = new Float64Array(net.crop * net.crop * channels);
    const top = (height - net.crop) >> 1, left = (width - net.crop) >> 1;
    let total = 0, squares = 0, k = 0;
    for (let y = 0; y < net.crop; y++) {
        for (let x = 0; x < net.crop * channels; x++) {
            const value = pixels[((top + y) * width + left) * channels + x];
            found[k++] = value;
            total += value;
            squares += value * value;
        }
    }
    const count = found.length, mean = total / count, variance = squares / count - mean * mean;
    const deviation = Math.max(Math.sqrt(variance), count ** -0.5);
    return found.map(value => Math.fround((value - mean) / deviation));
}

/* Return the sums of a layer with real weights, in float64, [row][column][filter]. */
function convolveReal(x, layer) {
    const {height, width, channels, kernel: [rows, columns], filters, weights} = layer;
    const sums = new Float64Array(layer.outHeight * layer.outWidth * filters);
    let at = 0;
    for (let y = 0; y < layer.outHeight; y++) {
        for (let z = 0; z < layer.outWidth; z++) {
            for (let f = 0; f < filters; f++) {
                let sum = 0;
                for (let i = 0; i < rows; i++) {
                    const row = y * layer.stride + i - layer.top;
                    if (row < 0 || row >= height) continue;
                    for (let j = 0; j < columns; j++) {
                        const column = z * layer.stride + j - layer.left;
                        if (column < 0 || column >= width) continue;
                        let w = ((f * rows + i) * columns + j) * channels, a = (row * width + column) * channels;
                        for (let c = 0; c < channels; c++) sum += x[a++] * weights[w++];
                    }
                }
                sums[at++] = sum;
            }
        }
    }
    return sums;
}

/* Return the activations that a layer reads as bits, [group][row][column][word] with padding: not 0, and negative. */
function packActivations(activations, layer) {
    const {groups, words, channels, paddedHeight, paddedWidth} = layer;
    const size = groups * paddedHeight * paddedWidth * words;
    const nonzero = new Uint32Array(size), negative = new Uint32Array(size);
    for (let y = 0; y < paddedHeight; y++) {
        for (let x = 0; x < paddedWidth; x++) {
            const row = y - layer.top, column = x - layer.left;
            const inside = row >= 0 && row < layer.height && column >= 0 && column < layer.width;
            if (!inside && !layer.border) continue;
            const from = (row * layer.width + column) * channels;
            for (let c = 0; c < channels; c++) {
                const value = inside ? activations[from + c] : layer.border;
                if (!value) continue;
                const k = Math.floor(c / groups), group = c % groups;
                const word = ((group * paddedHeight + y) * paddedWidth + x) * words + (k >> 5), bit = 1 << (k & 31);
                nonzero[word] |= bit;
                if (value < 0) negative[word] |= bit;
            }
        }
    }
    return [nonzero, negative];
}

/* Return the sums of a ternary layer, [row][column][filter], and how many products were not 0. */
function convolveTernary(activations, layer) {
    const [nonzero, negative] = packActivations(activations, layer);
    const {groups, words, filters, stride, paddedHeight, paddedWidth, kernel: [rows, columns]} = layer;
    const sums = new Int32Array(layer.outHeight * layer.outWidth * filters), run = columns * words;
    const share = filters / groups, wNonzero = layer.nonzero, wNegative = layer.negative;
    let additions = 0;
    for (let f = 0; f < filters; f++) {
        const group = Math.floor(f / share);
        for (let y = 0; y < layer.outHeight; y++) {
            for (let x = 0; x < layer.outWidth; x++) {
                let both = 0, differ = 0;
                for (let i = 0; i < rows; i++) {
                    let a = ((group * paddedHeight + y * stride + i) * paddedWidth + x * stride) * words;
                    let w = (f * rows + i) * run;
                    for (let left = run; left > 0; left -= 31) {
                        let bothBytes = 0, differBytes = 0;  // counts per byte: at most 8 a word, 31 words fit
                        for (let k = Math.min(left, 31); k > 0; k--, a++, w++) {
                            let m = nonzero[a] & wNonzero[w];
                            let d = m & (negative[a] ^ wNegative[w]);
                            m -= m >>> 1 & 0x55555555;
                            m = (m & 0x33333333) + (m >>> 2 & 0x33333333);
                            bothBytes += m + (m >>> 4) & 0x0f0f0f0f;
                            d -= d >>> 1 & 0x55555555;
                            d = (d & 0x33333333) + (d >>> 2 & 0x33333333);
                            differBytes += d + (d >>> 4) & 0x0f0f0f0f;
                        }
                        both += addBytes(bothBytes);
                        differ += addBytes(differBytes);
                    }
                }
                sums[(y * layer.outWidth + x) * filters + f] = both - 2 * differ;
                additions += both;
            }
        }
    }
    return {sums, additions};
}

function addBytes(word) {
    return (word & 255) + (word >>> 8 & 255) + (word >>> 16 & 255) + (word >>> 24);
}

/* Return a filter's thresholds [upper, lower] moved by `shift`; infinite ones are beyond every sum. */
function thresholds(layer, f, shift) {
    const upper = layer.upper[f], lower = layer.lower[f], {reach} = layer;
    return [upper > reach ? Infinity : upper <= -reach ? -Infinity : upper + shift,
            lower < -reach ? -Infinity : lower >= reach ? Infinity : lower + shift];
}

/* Return activations of sums: +1 from upper on, -1 up to lower, both moved by `shift`. */
function fire(sums, layer, shift = 0) {
    const found = new Int8Array(sums.length), {filters} = layer;
    const moved = Array.from({length: filters}, (_, f) => thresholds(layer, f, shift));
    const upper = Float64Array.from(moved, pair => pair[0]), lower = Float64Array.from(moved, pair => pair[1]);
    for (let k = 0, f = 0; k < sums.length; k++) {
        found[k] = (sums[k] >= upper[f]) - (sums[k] <= lower[f]);
        if (++f === filters) f = 0;
    }
    return found;
}

/* Return whether the network was trained with --rest -1, so that its activations are at rest at -1. */
function isFromRest(net) {
    return net.layers.some(layer => layer.border === -1);
}

/* Delete spikes: an activation is |activation - rest| spikes, and the second one of k has the index k + length. */
function thin(activations, rest, deleted) {
    activations.forEach((value, k) => {
        let left = 0;
        for (let spike = 0; spike < Math.abs(value - rest); spike++) left += !deleted(k + spike * activations.length);
        activations[k] = rest + Math.sign(value - rest) * left;
    });
}

/* Run the network on pixels, a Uint8Array [height * width * channels].

   deleted   function of an index that tells whether a spike of the encoder is deleted; see thin
   shift     added to all thresholds of ternary layers

   Returns scores (the logits), prediction, activations per layer [row][column][filter], and per layer counts of spikes
   and additions. */
function run(net, pixels, deleted = null, shift = 0) {
    let x = prepare(pixels, net);
    if (net.stem) {
        const {filters, scale, shift: moved} = net.stem;
        x = convolveReal(x, net.stem).map((sum, k) => Math.max(0, sum * scale[k % filters] + moved[k % filters]));
    }
    const activations = [], counts = [], sums = [];
    for (const [index, layer] of net.layers.entries()) {
        const found = index ? convolveTernary(activations[index - 1], layer)
            : {sums: Float32Array.from(convolveReal(x, layer)), additions: 0};
        const fired = fire(found.sums, layer, index ? shift : 0);
        if (!index && deleted) thin(fired, isFromRest(net) ? -1 : 0, deleted);
        activations.push(fired);
        sums.push(found.sums);
        counts.push({neurons: fired.length, additions: found.additions, products: found.sums.length * layer.fanIn});
    }
    const classes = net.classes.length, last = activations[activations.length - 1];
    const scores = new Float64Array(classes);
    for (let k = 0; k < classes; k++) {
        let sum = 0;
        for (let i = 0; i < last.length; i++) sum += last[i] * net.weights[i * classes + k];
        scores[k] = Math.fround(Math.fround(Math.fround(sum) * net.scale[k]) + net.shift[k]);
    }
    const prediction = scores.indexOf(Math.max(...scores));
    return {scores, prediction, activations, counts, sums};
}

if (typeof module !== 'undefined') module.exports = {parse, run, levels};
