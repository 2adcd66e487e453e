/* Run the network of a header, written by --mode export --format c, on its test vectors.

   The exit status is 0 if all activations and predictions agree. The program is plain C99 and needs only the header and
   sqrt. It sums ternary products bit by bit: it is meant to be read and ported, not to be fast.

       cc -O2 -ffp-contract=off -I. -DNETWORK=TWTA_4_4_MNIST -DHEADER='"TWTA_4_4_MNIST.h"' docs/reference.c -lm \
          -o reference && ./reference

   NETWORK is the name of the struct at the end of the header.

   -ffp-contract=off: preprocessing rounds every product, as NumPy and TensorFlow do.
*/
#include <math.h>
#include <stdio.h>
#ifndef HEADER
#error "say which network: -DNETWORK=TWTA_4_4_MNIST -DHEADER='\"TWTA_4_4_MNIST.h\"'"
#endif
#include HEADER
#define JOIN(a, b) a##b
#define OF(network, what) JOIN(network, what)

static int8_t maps[2][OF(NETWORK, _LARGEST_MAP)];
static float input[OF(NETWORK, _IMAGE)]; /* after the crop */
static const struct twta_network *const net = &NETWORK;

/* Write an image into input. Without a crop: pixels / 256. With one: its pixels, mean 0 and standard deviation 1. */
static void prepare(const uint8_t *image)
{
    const int height = net->crop ? net->crop : net->height, width = net->crop ? net->crop : net->width;
    const int top = (net->height - height) / 2, left = (net->width - width) / 2;
    const double values = (double)height * width * net->channels;
    double sum = 0, squares = 0, mean = 0, deviation = 256;
    for (int pass = 0; pass < 2; pass++) {
        int k = 0;
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++)
                for (int c = 0; c < net->channels; c++) {
                    double value = image[((top + y) * net->width + left + x) * net->channels + c];
                    sum += value;
                    squares += value * value;
                    input[k++] = (float)((value - mean) / deviation);
                }
        if (!net->crop)
            return;
        if (!pass) {
            mean = sum / values;
            deviation = fmax(sqrt(squares / values - mean * mean), 1 / sqrt(values));
        }
    }
}

/* Run one layer. The encoder sums real products in double, the other layers sum ternary products in whole numbers. */
static void run(const struct twta_layer *l, const int8_t *in, int8_t *out)
{
    const int per_group = l->channels / l->groups, filters = l->filters / l->groups;
    const int weights = l->kernel_height * l->kernel_width * per_group, words = (weights + 31) / 32;
    for (int y = 0; y < l->out_height; y++)
        for (int x = 0; x < l->out_width; x++)
            for (int f = 0; f < l->filters; f++) {
                double real = 0;
                int32_t sum = 0;
                for (int k = 0; k < weights; k++) {
                    const int row = y * l->stride - l->top + k / per_group / l->kernel_width;
                    const int column = x * l->stride - l->left + k / per_group % l->kernel_width;
                    const int channel = k % per_group * l->groups + f / filters;
                    const int at = (row * l->width + column) * l->channels + channel;
                    const int outside = row < 0 || row >= l->height || column < 0 || column >= l->width;
                    if (l->real)
                        real += outside ? 0 : (double)input[at] * l->real[f * weights + k];
                    else if (l->nonzero[f * words + k / 32] >> k % 32 & 1) {
                        const int value = outside ? l->border : in[at];
                        sum += l->negative[f * words + k / 32] >> k % 32 & 1 ? -value : value;
                    }
                }
                *out++ = l->real ? ((float)real >= l->real_upper[f]) - ((float)real <= l->real_lower[f])
                                 : (sum >= l->upper[f]) - (sum <= l->lower[f]);
            }
}

int main(void)
{
    int wrong = 0;
    for (int n = 0; n < net->vectors; n++) {
        const float *known = net->logits + (size_t)n * net->classes;
        float logits[OF(NETWORK, _CLASSES)];
        int best = 0, expected = 0;
        prepare(net->images + (size_t)n * net->height * net->width * net->channels);
        for (int i = 0; i < net->layers; i++) {
            const struct twta_layer *l = &net->layer[i];
            const size_t size = (size_t)l->out_height * l->out_width * l->filters;
            run(l, maps[i % 2], maps[(i + 1) % 2]);
            for (size_t k = 0; k < size; k++)
                wrong += maps[(i + 1) % 2][k] != net->activations[i][n * size + k];
        }
        for (int c = 0; c < net->classes; c++) {
            double sum = 0;
            for (int k = 0; k < net->features; k++)
                sum += maps[net->layers % 2][k] * (double)net->weights[k * net->classes + c];
            logits[c] = (float)sum * net->scale[c] + net->shift[c];
            if (logits[c] > logits[best])
                best = c;
            if (known[c] > known[expected])
                expected = c;
        }
        wrong += best != expected;
        printf("image %d: %s\n", n, net->class_names[best]);
    }
    printf("%s: %d activations or predictions differ\n", net->name, wrong);
    return wrong != 0;
}
