// qkv.hpp — everything, in reading order: a header includes only what stands above it (detail/ aside); a test checks it.
// One is named and not included: a program that wants it pays for Eigen's decompositions, two thirds of the time to compile.
#pragma once

// clang-format off

// Ground
#include "version.hpp"                  // the version, the build, the refused compiler modes
#include "matrix.hpp"                   // tokens are rows; views; the vocabulary
#include "storage.hpp"                  // float, half, bfloat16 and int8 rows
#include "parallel.hpp"                 // executors: serial, OpenMP, a pool, yours
#include "workspace.hpp"                // scratch memory that belongs to the caller
#include "kernel/packets.hpp"           // Eigen's registers of numbers, and what they lack
#include "kernel/powers.hpp"            // 2ˣ of them
#include "kernel/simd.hpp"              // a register of numbers on every instruction set
#include "kernel/register_tile.hpp"     // the one inner loop of every product
#include "kernel/packed_weights.hpp"    // weights laid out to stream, in any storage
#include "kernel/gemm.hpp"              // matrix products with one order of summation
#include "kernel/words.hpp"             // products of bfloat16 and int8, 32 bits at a time
#include "kernel/shorts.hpp"            // products of int16, two at a time
#include "kernel/word_tile.hpp"         // the inner loop with words for numbers
#include "kernel/arithmetic.hpp"        // in which numbers a kernel multiplies

// Into attention
#include "embedding.hpp"                // tokens -> vectors
#include "position.hpp"                 // sinusoidal and learned positions, ALiBi slopes
#include "rope_config.hpp"              // rotary positions: what a model says about them
#include "rope.hpp"                     // rotary positions: the rotation
#include "norm.hpp"                     // RMSNorm, LayerNorm
#include "projection.hpp"               // x·W + b
#include "heads.hpp"                    // heads are column blocks: MHA, GQA, MQA

// Attention
#include "mask.hpp"                     // who may see whom
#include "data_masks.hpp"               // masks over lengths, documents, boolean matrices
#include "score.hpp"                    // what happens to q·k
#include "softmax.hpp"                  // softmax, and the state (m, l, o) that merges
#include "options.hpp"                  // what a call may ask for; which kernel serves it
#include "key_rows.hpp"                 // what a kernel knows of a cache
#include "kernel/pair_rule.hpp"         // what a kernel knows of masks and scores
#include "kernel/position_grid.hpp"     // keys in cells of absolute positions
#include "kernel/task.hpp"              // what every kernel gets and gives
#include "kernel/reference.hpp"         // loops straight from the formula: the oracle
#include "kernel/panels.hpp"            // keys and values as the tiled kernel reads them
#include "kernel/panel_packer.hpp"      // … and how they get there
#include "kernel/query_panels.hpp"      // queries packed for the tiled kernel
#include "kernel/panel_mask.hpp"        // what a panel of queries sees of a block of keys
#include "kernel/panel_softmax.hpp"     // scores of a panel become weights
#include "kernel/value_tile.hpp"        // the second product, at the edges of a mask too
#include "kernel/panel_sums.hpp"        // the softmax state of a panel, and its way out
#include "kernel/panel_step.hpp"        // a panel of queries meets a block of keys
#include "kernel/tiled.hpp"             // many queries: prefill
#include "kernel/dots.hpp"              // in which numbers q·k is multiplied
#include "kernel/row_dots.hpp"          // rows of a cache as they lie: q·k
#include "kernel/row_sums.hpp"          // … and p·v
#include "kernel/row_pairs.hpp"         // int8 rows two at a time, as pairs of 16 bits
#include "kernel/pair_sums.hpp"         // … and p·v of them
#include "kernel/decode_scratch.hpp"    // chunks of keys, and states of queries
#include "kernel/decode_weights.hpp"    // from the scores of a chunk to weights
#include "kernel/decode_head.hpp"       // one kv head, a chunk of keys at a time
#include "kernel/decode.hpp"            // few queries: decode
#include "attention.hpp"                // the front door
#include "explain.hpp"                  // what a call will do, in one line

// With memory
#include "model_config.hpp"             // sizes of layers, presets of known models
#include "memory.hpp"                   // what a cache costs, constexpr
#include "kv_cache.hpp"                 // every row so far
#include "ring_cache.hpp"               // a sliding window in fixed memory
#include "page_pool.hpp"                // pages that sequences share, and who gives them up
#include "paged_cache.hpp"              // a sequence in pages: fork, copy-on-write
#include "latent_cache.hpp"             // MLA: one latent per token
#include "paged_latent_cache.hpp"       // latents in pages of a shared pool
#include "saved_cache.hpp"              // a cache in a file: checksum, version, the same bits

// Layers
#include "multi_head_weights.hpp"       // their matrices
#include "multi_head_attention.hpp"     // MHA, GQA, MQA
#include "kernel/lane_parts.hpp"        // few heads: several lanes for one head
#include "kernel/latent_tiles.hpp"      // the two products of absorbed attention, in registers
#include "kernel/latent_grid.hpp"       // the blocks of positions they go through
#include "kernel/latent_packing.hpp"    // latent rows packed: values, scales, offsets
#include "kernel/latent_blocks.hpp"     // latent rows as they are multiplied
#include "kernel/latent_queries.hpp"    // queries turned so that lanes are heads
#include "kernel/lane_scores.hpp"       // scores of its lanes become weights
#include "kernel/absorbed.hpp"          // absorbed latent attention: all heads share a row
#include "kernel/latent_splits.hpp"     // its keys in splits, its heads in groups
#include "kernel/latent.hpp"            // latent attention, naive and absorbed
#include "latent_weights.hpp"           // the matrices of MLA
#include "latent_form.hpp"              // restore keys and values, or never
#include "latent_attention.hpp"         // MLA
#include "checkpoint.hpp"               // weights from PyTorch, GPT-2, Llama, DeepSeek

// By its own name only: a tool, not a part of running a model
// #include "compress.hpp"              // MHA, GQA and MQA turned into MLA
// clang-format on
