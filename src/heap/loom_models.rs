//! Models of what threads, handles and the hub do to each other at the end of their lives. What they hold on to is
//! the same as in the pool; the memory is a cell whose every access the model checker watches.

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicUsize, Ordering, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// An instance of the heap as its handles and the tables of threads see it: `Arc` and `Weak`, spelled out since the
/// model checker has no `Weak`.
struct Instance {
    handles: AtomicUsize,
    /// What `demolish` unmaps: whether it is there, and heaps that threads left behind.
    memory: UnsafeCell<Memory>,
    lock: Mutex<()>,
}

struct Memory {
    mapped: bool,
    left_behind: usize,
}

// SAFETY: `memory` is watched by the model checker.
unsafe impl Sync for Instance {}
// SAFETY: as above.
unsafe impl Send for Instance {}

impl Instance {
    fn new(handles: usize) -> Arc<Self> {
        Arc::new(Self {
            handles: AtomicUsize::new(handles),
            memory: UnsafeCell::new(Memory { mapped: true, left_behind: 0 }),
            lock: Mutex::new(()),
        })
    }

    fn upgrade(&self) -> bool {
        let mut handles = self.handles.load(Ordering::Relaxed);
        while handles != 0 {
            match self.handles.compare_exchange(handles, handles + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => handles = now,
            }
        }
        false
    }

    /// The end of a handle; of the last, the end of the memory.
    fn drop_handle(&self) {
        if self.handles.fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            // SAFETY: the model checker refuses an access beside others.
            self.memory.with_mut(|memory| unsafe {
                assert!((*memory).mapped, "unmapped twice");
                (*memory).mapped = false;
            });
        }
    }

    /// What the table of a thread does with one of its entries when the thread ends.
    fn thread_ends(&self) -> bool {
        if !self.upgrade() {
            return false;
        }
        {
            let _held = self.lock.lock().unwrap();
            // SAFETY: as above.
            self.memory.with_mut(|memory| unsafe {
                assert!((*memory).mapped, "the heap of a thread went before it");
                (*memory).left_behind += 1;
            });
        }
        self.drop_handle();
        true
    }
}

#[test]
fn loom_threads_end_while_the_last_handle_goes() {
    loom::model(|| {
        let instance = Instance::new(1);
        let ends: Vec<_> = (0..2)
            .map(|_| {
                let instance = instance.clone();
                thread::spawn(move || instance.thread_ends())
            })
            .collect();
        instance.drop_handle();
        let returned = ends.into_iter().map(|end| end.join().unwrap()).filter(|left| *left).count();
        // SAFETY: all threads are joined.
        instance.memory.with(|memory| unsafe {
            assert!(!(*memory).mapped, "memory of a pool without handles is left");
            assert_eq!((*memory).left_behind, returned);
        });
    });
}

/// A handle that another thread still uses keeps the memory through the ends of all others.
#[test]
fn loom_a_user_outlives_the_maker() {
    loom::model(|| {
        let instance = Instance::new(2);
        let user = {
            let instance = instance.clone();
            thread::spawn(move || {
                {
                    let _held = instance.lock.lock().unwrap();
                    // SAFETY: as above.
                    instance.memory.with(|memory| unsafe { assert!((*memory).mapped) });
                }
                instance.drop_handle();
                // The thread's table goes after its handle.
                instance.thread_ends()
            })
        };
        instance.drop_handle();
        instance.thread_ends();
        user.join().unwrap();
        // SAFETY: all threads are joined.
        instance.memory.with(|memory| unsafe { assert!(!(*memory).mapped) });
    });
}
