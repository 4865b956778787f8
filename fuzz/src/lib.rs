//! What the engine targets share: a script read from the fuzzer's bytes, run on any engine against a model.

pub mod pools;

use std::alloc::Layout;
use std::collections::BTreeMap;

use memory_pool::engine::{Block, Engine, Span};

/// Memory that an engine may be given, aligned to 64 KiB and zero.
pub struct Memory {
    start: usize,
    layout: Layout,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len, 1 << 16).unwrap();
        // SAFETY: the layout has a size.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!memory.is_null());
        Self { start: memory.expose_provenance(), layout }
    }

    pub fn span(&self) -> Span {
        Span { start: self.start, len: self.layout.size(), zeroed: true }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`.
        unsafe { std::alloc::dealloc(std::ptr::with_exposed_provenance_mut(self.start), self.layout) }
    }
}

fn bytes<'a>(start: usize, len: usize) -> &'a mut [u8] {
    // SAFETY: used on live blocks of `Memory`, one at a time.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(start), len) }
}

/// Runs a script on an engine that has no memory yet; the sizes go up to `largest`. Every step is checked
/// against a model, every invariant after it.
pub fn run<E: Engine>(mut engine: E, script: &[u8], largest: usize) {
    let memories = [Memory::new(1 << 15), Memory::new(5000), Memory::new(1 << 14)];
    for memory in &memories {
        // SAFETY: the memory outlives the engine's use of it. A refused span is no error.
        let _ = unsafe { engine.add(memory.span()) };
    }
    let mut live: BTreeMap<usize, (usize, u8)> = BTreeMap::new();
    for (step, chunk) in script.chunks_exact(4).enumerate() {
        let fill = step as u8 | 1;
        let number = usize::from(u16::from_le_bytes([chunk[1], chunk[2]]));
        let size = number % largest + 1;
        let picked = live.keys().nth(number % live.len().max(1)).copied();
        match (chunk[0] % 8, picked) {
            (0..=3, _) => {
                let align = 1 << if chunk[3] % 4 == 0 { chunk[3] / 4 % 13 } else { 0 };
                let Some(block) = engine.alloc(Layout::from_size_align(size, align).unwrap()) else { continue };
                let Block { start, size: usable, dirty } = block;
                assert!(usable >= size && start % align == 0);
                assert!(memories.iter().any(|memory| {
                    let Span { start: first, len, .. } = memory.span();
                    start >= first && start + usable <= first + len
                }));
                let before = live.range(..=start).next_back();
                assert!(before.is_none_or(|(other, (len, _))| other + len <= start));
                assert!(live.range(start..).next().is_none_or(|(other, _)| start + usable <= *other));
                assert!(bytes(start, usable)[dirty..].iter().all(|byte| *byte == 0));
                bytes(start, usable).fill(fill);
                live.insert(start, (usable, fill));
            }
            (4..=5, Some(start)) => {
                let (len, fill) = live.remove(&start).unwrap();
                assert!(bytes(start, len).iter().all(|byte| *byte == fill));
                // SAFETY: the block is live.
                assert_eq!(unsafe { engine.free(start) }, len);
                // SAFETY: refused before anything is touched.
                assert!(unsafe { engine.free_checked(start) }.is_err());
            }
            (6, Some(start)) => {
                let (len, fill) = live[&start];
                // SAFETY: the block is live.
                let new = unsafe {
                    if size > len { engine.grow(start, size).unwrap_or(len) } else { engine.shrink(start, size) }
                };
                assert!(new >= size.min(len) && live.range(start + 1..).next().is_none_or(|(o, _)| start + new <= *o));
                assert!(bytes(start, len.min(new)).iter().all(|byte| *byte == fill));
                bytes(start, new).fill(fill);
                live.insert(start, (new, fill));
            }
            (7, _) if chunk[3] == 0 => {
                // SAFETY: the model is emptied with it.
                unsafe { engine.reset() };
                live.clear();
            }
            (7, Some(start)) => {
                let inside = start + 1 + number % live[&start].0;
                if !live.contains_key(&inside) {
                    // SAFETY: no block begins there, so it is refused.
                    assert!(unsafe { engine.free_checked(inside) }.is_err());
                }
            }
            _ => {}
        }
        engine.check().unwrap();
        engine.settle();
        assert_eq!(engine.live_blocks(), live.len());
        assert_eq!(engine.live_bytes(), live.values().map(|(len, _)| len).sum::<usize>());
    }
    for start in live.into_keys() {
        // SAFETY: the block is live.
        unsafe { engine.free(start) };
    }
    engine.settle();
    engine.check().unwrap();
    while engine.remove_idle(usize::MAX).is_some() {}
    assert_eq!(engine.free_bytes().0, 0);
}
