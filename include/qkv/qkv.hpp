// qkv.hpp — everything, in the order of dependency: a header includes only what stands above it; a test checks it.
//
// To read the library, follow `Next:` in each header from version.hpp on: from tokens to layers and caches, then how a call
// runs, and registers last. One header is named here and not included: a program that wants it pays for Eigen's
// decompositions, two thirds of the time to compile.
#pragma once

// clang-format off

// Ground
// #include "base/warnings_off.hpp"           // warnings of g++ about intrinsics, off …
// #include "base/warnings_on.hpp"            // … and on again
#include "base/eigen.hpp"                     // Eigen's version, checked
#include "version.hpp"                        // the version, the build, the refused compiler modes
#include "base/require.hpp"                   // errors that state the rule and the numbers
#include "matrix.hpp"                         // tokens are rows; views; the vocabulary
#include "storage.hpp"                        // float, half, bfloat16 and int8 rows
#include "parallel.hpp"                       // executors: serial, OpenMP, a pool, yours
#include "workspace.hpp"                      // scratch memory that belongs to the caller

// Registers
#include "simd/isa/general.hpp"               // the interface of instruction sets, and its general forms
#include "simd/isa/sse2.hpp"                  // … of SSE2
#include "simd/isa/avx2.hpp"                  // … of AVX2
#include "simd/isa/avx_vnni.hpp"              // … with products of int8
#include "simd/isa/avx512.hpp"                // … of AVX-512
#include "simd/isa/avx512_narrow.hpp"         // … with products of bfloat16 and int8
#include "simd/isa/neon.hpp"                  // … of 64-bit Arm
#include "simd/isa.hpp"                       // that of this build; prefetches
#include "simd/exp2.hpp"                      // 2ˣ of them
#include "simd/simd.hpp"                      // a register of numbers on every instruction set
#include "simd/narrow.hpp"                    // products of bfloat16, int8 and int16, 32 bits at a time

// Products
#include "product/register_tile.hpp"          // the one inner loop of every product
#include "base/huge_pages.hpp"                // large arrays in huge pages
#include "product/packed_weights.hpp"         // weights laid out to stream, in any storage
#include "base/multiply_add.hpp"              // a·b + c, rounded alike wherever it is compiled
#include "base/overlap.hpp"                   // whether two matrices share an element
#include "product/packed_product.hpp"         // matrix products with one order of summation
#include "product/narrow_tile.hpp"            // the inner loop with words for numbers
#include "kernel/arithmetic.hpp"              // the number types in which a kernel multiplies
#include "product/tied_product.hpp"           // logits of tied embeddings

// Into attention
#include "embedding.hpp"                      // tokens -> vectors
#include "base/in_place.hpp"                  // outputs that may be their own input
#include "position.hpp"                       // sinusoidal and learned positions, ALiBi slopes
#include "rope_config.hpp"                    // rotary positions: pairing and frequencies
#include "rope.hpp"                           // rotary positions: the rotation
#include "norm.hpp"                           // RMSNorm, LayerNorm
#include "projection.hpp"                     // x·W + b
#include "heads.hpp"                          // heads are column blocks: MHA, GQA, MQA

// Masks, scores, options; what every kernel gets
#include "mask_protocol.hpp"                  // the members of a mask
#include "mask.hpp"                           // which query sees which key
#include "data_masks.hpp"                     // masks over lengths, documents, boolean matrices
#include "score.hpp"                          // what happens to q·k
#include "softmax.hpp"                        // softmax, and the state (m, l, o) that merges
#include "options.hpp"                        // options of a call; which kernel runs it
#include "key_rows.hpp"                       // a cache as kernels see it
#include "kernel/pair_rule.hpp"               // all that a kernel knows of masks and scores
#include "kernel/position_grid.hpp"           // keys in cells of absolute positions
#include "kernel/byte_rows.hpp"               // rows of a sequence without their storage type
#include "kernel/task.hpp"                    // input and output of every kernel
#include "kernel/reference.hpp"               // loops straight from the formula: the oracle

// Many queries: prefill
#include "kernel/tiled/packed_kv.hpp"         // keys and values as the tiled kernel reads them
#include "kernel/tiled/pack_kv.hpp"           // … and how they get there
#include "kernel/tiled/pack_queries.hpp"      // queries packed for the tiled kernel
#include "kernel/tiled/block_mask.hpp"        // the rule on a panel of queries and a block of keys
#include "kernel/register_softmax.hpp"        // scores of a panel become weights
#include "kernel/value_tile.hpp"              // the second product, at the edges of a mask too
#include "kernel/tiled/query_state.hpp"       // the softmax state of a panel, and its merge
#include "kernel/tiled/step.hpp"              // a panel of queries against a block of keys
#include "kernel/tiled/tiled.hpp"             // many queries: prefill

// Few queries: decode
#include "kernel/decode/dots.hpp"             // how q·k is multiplied
#include "kernel/decode/scores.hpp"           // rows of a cache as they lie: q·k
#include "kernel/decode/values.hpp"           // … and p·v
#include "kernel/decode/int8_row_pairs.hpp"   // int8 rows two at a time, as pairs of 16 bits
#include "kernel/decode/int8_values.hpp"      // … and p·v of them
#include "kernel/decode/state.hpp"            // softmax states of the queries
#include "kernel/decode/chunk_softmax.hpp"    // from the scores of a chunk to weights
#include "kernel/decode/head.hpp"             // one kv head, a chunk of keys at a time
#include "kernel/decode/decode.hpp"           // few queries: decode

// The front door
#include "call/pair_rule_of.hpp"              // any mask and score as the rule of kernels
#include "call/rule.hpp"                      // … and of a call
#include "call/checks.hpp"                    // what must hold before the first write
#include "call/dispatch.hpp"                  // runs the kernel of a call, item by item
#include "attention.hpp"                      // the front door
#include "explain.hpp"                        // what a call will do, in one line

// With memory
#include "model_config.hpp"                   // sizes of layers, presets of known models
#include "memory.hpp"                         // what a cache costs, constexpr
#include "cache/blocks.hpp"                   // rows of keys and values in memory
#include "cache/context_shift.hpp"            // keys rotated to new positions, rounded once
#include "kv_cache.hpp"                       // every row so far
#include "ring_cache.hpp"                     // a sliding window in fixed memory
#include "page_pool.hpp"                      // pages that sequences share
#include "cache/paged_rows.hpp"               // the page table of a sequence
#include "paged_cache.hpp"                    // a sequence in pages: fork, copy-on-write
#include "cache/latent_memory.hpp"            // rows of latents in memory
#include "latent_cache.hpp"                   // MLA: one latent per token
#include "paged_latent_cache.hpp"             // latents in pages of a shared pool
#include "cache/file.hpp"                     // the bytes of a saved cache, read and written
#include "saved_cache.hpp"                    // a cache in a file: checksum, version, the same bits

// Layers
#include "layer/common.hpp"                   // what the two layers share
#include "multi_head_weights.hpp"             // their matrices
#include "layer/appended.hpp"                 // appended rows, rolled back where a call fails
#include "layer/batch_rows.hpp"               // a batch as a layer has it
#include "layer/shared_prefix.hpp"            // pages that sequences begin with, attended to once
#include "layer/ring_positions.hpp"           // a ring that counts positions in the cache
#include "layer/batch.hpp"                    // sequences as one pool of work items
#include "layer/forward.hpp"                  // the calls of a layer, a single sequence or a batch
#include "multi_head_attention.hpp"           // MHA, GQA, MQA

// Latent attention
#include "kernel/absorbed/split_heads.hpp"    // few heads: several lanes for one head
#include "kernel/absorbed/tiles.hpp"          // the two products of absorbed attention, in registers
#include "kernel/absorbed/grid.hpp"           // the blocks of positions they go through
#include "kernel/absorbed/pack_rows.hpp"      // latent rows packed: values, scales, offsets
#include "kernel/absorbed/blocks.hpp"         // latent rows as they are multiplied
#include "kernel/absorbed/queries.hpp"        // queries transposed: lanes are heads
#include "kernel/absorbed/scores.hpp"         // scores of its lanes become weights
#include "kernel/absorbed/absorbed.hpp"       // absorbed latent attention: all heads share a row
#include "kernel/absorbed/splits.hpp"         // its keys in splits, its heads in groups
#include "call/latent_forms.hpp"              // latent attention, restored and absorbed
#include "absorbed_attention.hpp"             // latent attention on matrices: absorbed queries, latent rows
#include "latent_weights.hpp"                 // the matrices of MLA
#include "latent_form.hpp"                    // restore keys and values, or never
#include "latent_attention.hpp"               // MLA
#include "explain_layer.hpp"                  // what a layer will do, in one line
#include "checkpoint.hpp"                     // weights from PyTorch, GPT-2, Llama, DeepSeek

// By its own name only: a tool, not a part of running a model
// #include "compress/key_directions.hpp"     // which directions of the keys a latent keeps
// #include "compress.hpp"                    // MHA, GQA and MQA converted to MLA
// clang-format on
