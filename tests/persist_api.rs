//! Persistent pools as a program uses them: what is written is there again, what fails leaves nothing.

use std::alloc::Layout;
use std::fs;
use std::path::{Path, PathBuf};

use memory_pool::persist::{Durability, PBox, Persist, PersistentConfig, PersistentPool, Pointers};
use memory_pool::{AllocFlags, Error, MemoryPool, MemoryType};

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("memory-pool-api-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn file(&self) -> PathBuf {
        self.0.join("pool")
    }

    fn pool(&self, size: u64, durability: Durability) -> PersistentPool {
        let config = PersistentConfig::new(size).layout("test v1").durability(durability);
        PersistentPool::create(self.file(), config).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct Node {
    value: u64,
    next: PBox<Node>,
}

// SAFETY: a number and a pointer, no padding.
unsafe impl Persist for Node {
    fn pointers(visit: &mut Pointers) {
        visit.field::<PBox<Node>>(core::mem::offset_of!(Node, next));
    }
}

fn object_count(pool: &PersistentPool) -> usize {
    let mut count = 0;
    pool.read(|r| {
        r.for_each_object(|object| {
            count += usize::from(object.fingerprint >= 1 << 63);
            true
        });
        Ok(())
    })
    .unwrap();
    count
}

#[test]
fn what_was_committed_is_there_again_at_another_address() {
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let folder = Folder::new(&format!("again-{durability:?}"));
        let pool = folder.pool(4 << 20, durability);
        pool.transaction(|tx| {
            let tail = tx.alloc(Node { value: 2, next: PBox::null() })?;
            let head = tx.alloc(Node { value: 1, next: tail })?;
            tx.set_root("list", &head)?;
            let letter = tx.alloc('ä')?;
            tx.set_root("letter", &letter)
        })
        .unwrap();
        let before = pool.stats();
        pool.close().unwrap();

        let pool = PersistentPool::open(folder.file(), "test v1").unwrap();
        assert_eq!(pool.durability(), durability);
        assert_eq!(pool.recovered_records(), 0);
        pool.read(|r| {
            let head = r.root::<Node>("list")?;
            assert_eq!(head.value, 1);
            let tail = r.get(&head.next)?;
            assert_eq!((tail.value, tail.next.is_null()), (2, true));
            assert_eq!(*r.root::<char>("letter")?, 'ä');
            assert_eq!(r.root_names(), ["letter", "list"]);
            // The wrong type is refused.
            assert!(matches!(r.root::<u64>("list"), Err(Error::InvalidPointer(_))));
            assert!(r.root::<Node>("absent").unwrap_err().to_string().contains("absent"));
            Ok(())
        })
        .unwrap();
        let after = pool.stats();
        assert_eq!(after.allocation_count, before.allocation_count);
        assert_eq!(after.current_allocated, before.current_allocated);
    }
}

#[test]
fn errors_and_panics_undo_everything() {
    let folder = Folder::new("undo");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let number = pool
        .transaction(|tx| {
            let number = tx.alloc(1u64)?;
            tx.set_root("number", &number)?;
            Ok(number)
        })
        .unwrap();
    let objects = object_count(&pool);
    let change = |tx: &memory_pool::Transaction<'_>| {
        *tx.get_mut(&number)? = 2;
        let other = tx.alloc([0u64; 100])?;
        tx.set_root("number", &other)?;
        tx.set_root("other", &other)?;
        tx.free(number)?;
        assert!(tx.get(&number).is_err());
        Ok(())
    };
    let failed = pool.transaction(|tx| {
        change(tx)?;
        Err::<(), _>(tx.root::<u64>("no such root").map(drop).unwrap_err())
    });
    assert!(failed.is_err());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        pool.transaction(|tx| {
            change(tx)?;
            if object_count(&pool) > 0 {
                panic!("in the middle");
            }
            Ok(())
        })
    }));
    assert!(panicked.is_err());
    // An inner failure ends the outer one, too, even if that goes on.
    let swallowed = pool.transaction(|tx| {
        change(tx)?;
        let inner = pool.transaction(|inner| {
            inner.alloc(3u64)?;
            Err::<(), _>(inner.root::<u64>("no such root").map(drop).unwrap_err())
        });
        assert!(inner.is_err());
        Ok(())
    });
    assert!(swallowed.is_err());
    assert_eq!(pool.read(|r| Ok(*r.root::<u64>("number")?)).unwrap(), 1);
    assert!(pool.read(|r| r.root::<[u64; 100]>("other").map(drop)).is_err());
    assert_eq!(object_count(&pool), objects);
    // Locks and slots were given back.
    pool.transaction(|tx| change(tx)).unwrap();
    assert_eq!(object_count(&pool), objects);
}

#[test]
fn a_nested_transaction_is_part_of_the_outer_one() {
    let folder = Folder::new("nested");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    pool.transaction(|tx| {
        let outer = tx.alloc(1u64)?;
        pool.transaction(|inner| {
            *inner.get_mut(&outer)? += 1;
            inner.set_root("n", &outer)
        })?;
        // Not committed yet, and seen by this transaction.
        assert_eq!(*tx.root::<u64>("n")?, 2);
        assert!(pool.read(|r| r.root::<u64>("n").map(drop)).is_err());
        Ok(())
    })
    .unwrap();
    assert_eq!(pool.read(|r| Ok(*r.root::<u64>("n")?)).unwrap(), 2);
}

#[test]
fn borrows_in_a_transaction_exclude_each_other() {
    let folder = Folder::new("borrow");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let (a, b) = pool.transaction(|tx| Ok((tx.alloc(1u64)?, tx.alloc(2u64)?))).unwrap();
    pool.transaction(|tx| {
        let first = tx.get(&a)?;
        let again = tx.get(&a)?;
        assert_eq!(*first + *again, 2);
        assert!(tx.get_mut(&a).is_err() && tx.free(a).is_err());
        drop((first, again));
        let mut first = tx.get_mut(&a)?;
        let mut second = tx.get_mut(&b)?;
        core::mem::swap(&mut *first, &mut *second);
        assert!(tx.get(&a).is_err() && tx.get_mut(&a).is_err() && tx.free(a).is_err());
        // The nested call is the same transaction: the same rules.
        assert!(pool.transaction(|inner| inner.get(&a).map(drop)).is_err());
        Ok(())
    })
    .unwrap_err();
    let values = || pool.read(|r| Ok((*r.get(&a)?, *r.get(&b)?))).unwrap();
    assert_eq!(values(), (1, 2));
    pool.transaction(|tx| {
        let (mut first, mut second) = (tx.get_mut(&a)?, tx.get_mut(&b)?);
        core::mem::swap(&mut *first, &mut *second);
        Ok(())
    })
    .unwrap();
    assert_eq!(values(), (2, 1));
}

#[test]
fn stale_and_foreign_pointers_do_not_pass() {
    let (folder, other) = (Folder::new("stale"), Folder::new("foreign"));
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let foreign = other.pool(1 << 20, Durability::ProcessCrash);
    let number = pool.transaction(|tx| tx.alloc(5u64)).unwrap();
    foreign.transaction(|tx| tx.alloc(6u64)).unwrap();
    assert!(foreign.read(|r| r.get(&number).map(drop)).is_err());
    assert!(foreign.transaction(|tx| tx.get_mut(&number).map(drop)).is_err());
    assert!(foreign.transaction(|tx| tx.free(number)).is_err());
    assert!(foreign.transaction(|tx| tx.set_root("x", &number)).is_err());
    pool.transaction(|tx| tx.free(number)).unwrap();
    assert!(pool.read(|r| r.get(&number).map(drop)).is_err());
    assert!(pool.transaction(|tx| tx.free(number)).is_err());
    assert!(pool.read(|r| r.get(&PBox::<u64>::null()).map(drop)).is_err());
    // Bytes made into a pointer: any offset is either a live object of the type or an error.
    let live = pool.transaction(|tx| tx.alloc(7u64)).unwrap();
    let words = [pool.identity(), 0];
    let mut hits = 0;
    for offset in 0..(1u64 << 20) {
        let words = [words[0], offset];
        // SAFETY: two words, any of which are a valid pointer.
        let forged: PBox<u64> = unsafe { core::mem::transmute(words) };
        hits += u32::from(pool.read(|r| r.get(&forged).map(drop)).is_ok());
    }
    assert_eq!(hits, 1);
    assert_eq!(pool.read(|r| Ok(*r.get(&live)?)).unwrap(), 7);
}

#[test]
fn reserved_objects_vanish_unless_published() {
    let folder = Folder::new("reserve");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    pool.transaction(|tx| {
        let mut kept = tx.reserve::<[u64; 8]>()?;
        let _dropped = tx.reserve::<[u64; 8]>()?;
        let unwritten = tx.reserve::<[u64; 8]>()?;
        assert!(tx.publish(unwritten).is_err());
        kept.write([4; 8])[3] = 9;
        let kept = tx.publish(kept)?;
        tx.set_root("kept", &kept)
    })
    .unwrap();
    assert_eq!(object_count(&pool), 1);
    assert_eq!(pool.read(|r| Ok(r.root::<[u64; 8]>("kept")?[3])).unwrap(), 9);
}

#[test]
fn threads_transact_at_once_and_none_is_lost() {
    for durability in [Durability::ProcessCrash, Durability::Power] {
        let folder = Folder::new(&format!("threads-{durability:?}"));
        let pool = folder.pool(8 << 20, durability);
        let shared = pool
            .transaction(|tx| {
                let shared = tx.alloc(0u64)?;
                tx.set_root("shared", &shared)?;
                Ok(shared)
            })
            .unwrap();
        const THREADS: u64 = 8;
        const EACH: u64 = 60;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let pool = &pool;
                scope.spawn(move || {
                    let name = format!("own {thread}");
                    for i in 0..EACH {
                        pool.transaction(|tx| {
                            let own = tx.alloc([thread, i])?;
                            if let Ok(old) = tx.root_handle::<PBox<[u64; 2]>>(&name) {
                                assert_eq!(tx.get(&old)?[1], i - 1);
                                tx.free(old)?;
                            }
                            tx.set_root(&name, &own)
                        })
                        .unwrap();
                        pool.transaction(|tx| {
                            *tx.get_mut(&shared)? += 1;
                            Ok(())
                        })
                        .unwrap();
                        pool.read(|r| {
                            assert_eq!(r.root::<[u64; 2]>(&name)?[1], i);
                            Ok(())
                        })
                        .unwrap();
                    }
                });
            }
        });
        assert_eq!(pool.read(|r| Ok(*r.get(&shared)?)).unwrap(), THREADS * EACH);
        assert_eq!(object_count(&pool) as u64, THREADS + 1);
        if durability == Durability::Power {
            assert!(pool.sync_count() < 2 * pool.record_count(), "{} syncs", pool.sync_count());
        }
    }
}

#[test]
fn crossed_locks_are_a_conflict_and_not_a_deadlock() {
    let folder = Folder::new("cross");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let (a, b) = pool.transaction(|tx| Ok((tx.alloc(0u64)?, tx.alloc(0u64)?))).unwrap();
    std::thread::scope(|scope| {
        for turn in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                let (first, second) = if turn % 2 == 0 { (a, b) } else { (b, a) };
                let mut done = 0;
                while done < 300 {
                    let outcome = pool.transaction(|tx| {
                        *tx.get_mut(&first)? += 1;
                        *tx.get_mut(&second)? += 1;
                        Ok(())
                    });
                    match outcome {
                        Ok(()) => done += 1,
                        Err(error) => assert!(error.to_string().contains("again"), "{error}"),
                    }
                }
            });
        }
    });
    assert_eq!(pool.read(|r| Ok((*r.get(&a)?, *r.get(&b)?))).unwrap(), (1200, 1200));
}

#[test]
fn a_commit_waits_for_readers() {
    let folder = Folder::new("wait");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let number = pool.transaction(|tx| tx.alloc(1u64)).unwrap();
    let (begun, begin) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let pool = &pool;
        let writer = scope.spawn(move || {
            begin.recv().unwrap();
            pool.transaction(|tx| tx.free(number)).unwrap();
        });
        pool.read(|r| {
            let value = r.get(&number)?;
            begun.send(()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(*value, 1);
            assert!(!writer.is_finished());
            // A transaction here would wait for itself.
            assert!(pool.transaction(|tx| tx.alloc(0u64)).is_err());
            pool.read(|inner| inner.get(&number).map(drop))
        })
        .unwrap();
    });
    assert!(pool.read(|r| r.get(&number).map(drop)).is_err());
}

#[test]
fn space_is_used_again_for_other_sizes() {
    let folder = Folder::new("space");
    let pool = folder.pool(2 << 20, Durability::ProcessCrash);
    for round in 0..20u64 {
        // Nearly all of the pool as small objects, then as large ones.
        let small: Vec<_> =
            (0..20_000).map(|n| pool.transaction(|tx| tx.alloc([n, round])).unwrap()).collect();
        small.chunks(500).for_each(|some| {
            pool.transaction(|tx| some.iter().try_for_each(|object| tx.free(*object))).unwrap();
        });
        let large = pool.allocate(Layout::new::<[u8; 1 << 20]>()).unwrap();
        // SAFETY: the block is ours, and not used after it is freed.
        unsafe {
            large.cast::<u8>().write_bytes(round as u8, large.len());
            pool.deallocate(large.cast());
        }
    }
    assert_eq!(object_count(&pool), 0);
}

#[test]
fn a_full_pool_says_so_and_grows() {
    let folder = Folder::new("grow");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let error = pool.allocate(Layout::new::<[u8; 2 << 20]>()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }) && error.to_string().contains("grow"), "{error}");
    let mut made = 0;
    let error = loop {
        match pool.transaction(|tx| tx.alloc([made; 64])) {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::OutOfMemory { .. }));
    assert!(made > 1500, "{made} of 512 bytes in 1 MiB");
    pool.grow(3 << 20).unwrap();
    let raw = pool.allocate(Layout::new::<[u8; 2 << 20]>()).unwrap();
    let big = pool.transaction(|tx| tx.alloc([5u8; 200 << 10])).unwrap();
    pool.transaction(|tx| tx.set_root("big", &big)).unwrap();
    assert!(pool.size() >= 4 << 20 && pool.size() == fs::metadata(folder.file()).unwrap().len());
    pool.close().unwrap();
    let pool = PersistentPool::open(folder.file(), "test v1").unwrap();
    assert_eq!(pool.read(|r| Ok(r.root::<[u8; 200 << 10]>("big")?[9])).unwrap(), 5);
    assert_eq!((raw.len(), pool.active_allocations()[0].size), (2 << 20, 2 << 20));
    assert_eq!(object_count(&pool) as u64, made + 1);
}

#[test]
fn a_backup_is_a_pool_of_its_own() {
    let folder = Folder::new("backup");
    let pool = folder.pool(4 << 20, Durability::ProcessCrash);
    let number = pool
        .transaction(|tx| {
            let number = tx.alloc(1u64)?;
            tx.set_root("n", &number)?;
            Ok(number)
        })
        .unwrap();
    let copy = folder.0.join("copy");
    pool.backup(&copy).unwrap();
    assert!(pool.backup(&copy).is_err(), "an existing file is not overwritten");
    pool.transaction(|tx| tx.set(&number, 2)).unwrap();
    let backup = PersistentPool::open_read_only(&copy, "test v1").unwrap();
    assert_eq!(backup.read(|r| Ok(*r.root::<u64>("n")?)).unwrap(), 1);
    assert!(backup.transaction(|tx| tx.set(&number, 3)).is_err());
    assert!(backup.allocate(Layout::new::<u64>()).is_err() && backup.grow(1).is_err());
    // Readers may be many.
    let again = PersistentPool::open_read_only(&copy, "test v1").unwrap();
    assert!(PersistentPool::open(&copy, "test v1").is_err());
    drop((backup, again));
    PersistentPool::open(&copy, "test v1").unwrap().close().unwrap();
    let used = std::process::Command::new("du").arg("-k").arg(&copy).output().unwrap();
    let used: u64 = String::from_utf8_lossy(&used.stdout).split_whitespace().next().unwrap().parse().unwrap();
    assert!(used < 1500, "{used} KiB for an almost empty copy of 4 MiB");
}

#[test]
fn raw_blocks_last_and_scratch_does_not() {
    let folder = Folder::new("raw");
    let pool = folder.pool(4 << 20, Durability::ProcessCrash);
    let dynamic: &dyn MemoryPool = &pool;
    assert_eq!(dynamic.memory_type(), MemoryType::Persistent);
    let block =
        dynamic.allocate_with(Layout::from_size_align(1000, 256).unwrap(), AllocFlags::ZEROED).unwrap();
    let address = block.cast::<u8>();
    assert!(block.len() >= 1000 && (address.as_ptr() as usize).is_multiple_of(256));
    assert!(pool.owns(address) && pool.usable_size(address) == Some(block.len()));
    // SAFETY: the block is ours.
    unsafe { address.write_bytes(7, 1000) };
    pool.persist(address.as_ptr(), 1000).unwrap();
    assert!(pool.persist(address.as_ptr(), 1 << 40).is_err());
    assert!(pool.persist(&raw const folder as *const u8, 1).is_err());
    let offset = pool.offset_of(address).unwrap();

    let mut scratch = allocator_api2::vec::Vec::new_in(&pool);
    scratch.extend(0..10_000u64);
    assert_eq!(scratch.iter().sum::<u64>(), 49_995_000);
    assert_eq!(pool.active_allocations().len(), 2);
    assert!(pool.reset().is_err());
    drop(scratch);
    let mut leaked = allocator_api2::vec::Vec::new_in(pool.clone());
    leaked.extend(0..100u64);
    assert!(pool.clone().close().is_err(), "a container still holds the pool");
    drop(leaked);
    let mut forgotten = allocator_api2::vec::Vec::new_in(&pool);
    forgotten.push(1u8);
    core::mem::forget(forgotten);
    pool.close().unwrap();

    let pool = PersistentPool::open(folder.file(), "test v1").unwrap();
    assert_eq!(pool.active_allocations().len(), 1);
    let block = pool.address_of(offset).unwrap();
    // SAFETY: live, and nobody else has it.
    assert!(unsafe { block.as_ref() }[..1000].iter().all(|&byte| byte == 7));
    pool.read(|_| {
        // SAFETY: live, and not used after. Inside a read the free comes about when it ends.
        unsafe { pool.deallocate(block.cast()) };
        Ok(())
    })
    .unwrap();
    assert!(!pool.has_leaks() && pool.reset().is_ok());
    assert!(pool.address_of(offset).is_none());
}

#[test]
fn wrong_files_and_names_get_errors_that_help() {
    let folder = Folder::new("wrong");
    let path = folder.file();
    let open = |path: &Path| PersistentPool::open(path, "test v1").unwrap_err();
    assert!(matches!(open(&path), Error::Io(_)));
    assert!(matches!(open(&folder.0), Error::Io(_) | Error::Corrupt { .. }));
    for content in [&b""[..], b"short", &[0x55; 100_000]] {
        fs::write(&path, content).unwrap();
        let error = open(&path);
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(PersistentPool::open_read_only(&path, "test v1").is_err());
        assert_eq!(fs::read(&path).unwrap(), content, "a file that was not recognised was written to");
    }
    fs::remove_file(&path).unwrap();
    let too_small = PersistentPool::create(&path, PersistentConfig::new(1000)).unwrap_err();
    assert!(matches!(too_small, Error::Config(_)) && !path.exists());
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let second = open(&path);
    assert!(second.to_string().contains("open elsewhere"), "{second}");
    assert!(PersistentPool::open_read_only(&path, "test v1").is_err());
    assert!(PersistentPool::create(&path, PersistentConfig::new(1 << 20)).is_err());
    pool.close().unwrap();
    let layout = PersistentPool::open(&path, "test v2").unwrap_err();
    assert!(layout.to_string().contains("test v1"), "{layout}");
    // On a file system without DAX that durability is refused.
    let dax = PersistentPool::open_with(&path, "test v1", Durability::Dax).unwrap_err();
    assert!(matches!(dax, Error::Config(_)), "{dax}");
    let whole = fs::read(&path).unwrap();
    for cut in [whole.len() - 1, whole.len() / 2, 4096, 4095, 100] {
        fs::write(&path, &whole[..cut]).unwrap();
        let error = open(&path);
        assert!(error.to_string().contains("truncated"), "{cut}: {error}");
    }
    fs::write(&path, &whole).unwrap();
    PersistentPool::open(&path, "test v1").unwrap();
}

#[test]
fn one_broken_header_is_replaced_by_its_copy() {
    let folder = Folder::new("header");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    pool.transaction(|tx| {
        let n = tx.alloc(1u64)?;
        tx.set_root("n", &n)
    })
    .unwrap();
    pool.close().unwrap();
    let whole = fs::read(folder.file()).unwrap();
    for broken in [0usize, 4096] {
        let mut bytes = whole.clone();
        bytes[broken..broken + 4096].fill(0xEE);
        fs::write(folder.file(), &bytes).unwrap();
        let pool = PersistentPool::open(folder.file(), "test v1").unwrap();
        assert_eq!(pool.read(|r| Ok(*r.root::<u64>("n")?)).unwrap(), 1);
        pool.close().unwrap();
        assert_eq!(fs::read(folder.file()).unwrap()[..8192], whole[..8192]);
    }
}

#[test]
fn a_read_only_file_can_be_read() {
    let folder = Folder::new("readonly");
    folder.pool(1 << 20, Durability::ProcessCrash).close().unwrap();
    let mut permissions = fs::metadata(folder.file()).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(folder.file(), permissions).unwrap();
    // SAFETY: no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        assert!(matches!(PersistentPool::open(folder.file(), "test v1"), Err(Error::Io(_))));
    }
    let pool = PersistentPool::open_read_only(folder.file(), "test v1").unwrap();
    assert!(pool.is_read_only());
    assert_eq!(object_count(&pool), 0);
}

#[test]
fn a_forked_child_leaves_the_pool_to_its_parent() {
    let folder = Folder::new("fork");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    // SAFETY: the child only calls the pool, which takes no lock that another thread of this test holds, and
    // leaves at once.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = pool.transaction(|tx| tx.alloc(1u64)).is_err();
        drop(pool);
        // SAFETY: leaves without running anything of the parent's.
        unsafe { libc::_exit(i32::from(!refused)) };
    }
    let mut status = 0;
    // SAFETY: the child is ours.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0);
    pool.transaction(|tx| tx.alloc(1u64)).unwrap();
    assert!(PersistentPool::open(folder.file(), "test v1").is_err(), "the child gave the lock away");
}

/// What was applied and is durable is never applied again over what came later.
#[test]
fn closing_in_order_keeps_the_last_of_several_changes() {
    for durability in [Durability::Power, Durability::ProcessCrash] {
        for count in 1..8u64 {
            let dir = std::env::temp_dir().join(format!("memory-pool-last-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            let path = dir.join("pool");
            let pool =
                PersistentPool::create(&path, PersistentConfig::new(1 << 20).durability(durability)).unwrap();
            let number = pool.transaction(|tx| {
                let number = tx.alloc(0u64)?;
                tx.set_root("number", &number)?;
                Ok(number)
            });
            let number = number.unwrap();
            (1..=count).for_each(|i| pool.transaction(|tx| tx.set(&number, i)).unwrap());
            pool.close().unwrap();
            let pool = PersistentPool::open(&path, "").unwrap();
            assert_eq!(pool.recovered_records(), 0, "{durability:?}, {count}");
            assert_eq!(pool.read(|r| Ok(*r.root::<u64>("number")?)).unwrap(), count, "{durability:?}");
            drop(pool);
            std::fs::remove_dir_all(&dir).unwrap();
        }
    }
}

#[test]
fn counts_go_on_across_openings_and_hide_what_was_done_while_off() {
    let folder = Folder::new("counts");
    let pool = folder.pool(2 << 20, Durability::ProcessCrash);
    let pair = |pool: &PersistentPool| {
        let object = pool.transaction(|tx| tx.alloc([1u64; 8])).unwrap();
        pool.transaction(|tx| tx.free(object)).unwrap();
        let block = pool.allocate(Layout::new::<[u64; 8]>()).unwrap();
        // SAFETY: live, freed once.
        unsafe { pool.deallocate(block.cast()) };
    };
    // The first one registers its type, which stays.
    pair(&pool);
    let counts = |pool: &PersistentPool| {
        let stats = pool.stats();
        (stats.allocation_count, stats.deallocation_count, stats.total_allocated, stats.current_allocated)
    };
    let (allocs, frees, bytes, current) = counts(&pool);
    assert_eq!((allocs, frees), (3, 2));
    pool.set_tracking(false);
    assert!(!pool.is_tracking());
    pair(&pool);
    let kept = pool.transaction(|tx| tx.alloc([2u64; 8])).unwrap();
    assert_eq!(counts(&pool), (allocs, frees, bytes, current + 64), "what is live is no count");
    pool.set_tracking(true);
    pair(&pool);
    assert_eq!(counts(&pool), (allocs + 2, frees + 2, bytes + 128, current + 64));
    pool.close().unwrap();
    // The file has counted all of it.
    let pool = PersistentPool::open(folder.file(), "test v1").unwrap();
    assert_eq!(counts(&pool), (allocs + 5, frees + 4, bytes + 5 * 64, current + 64));
    pool.transaction(|tx| tx.free(kept)).unwrap();
    assert_eq!(counts(&pool), (allocs + 5, frees + 5, bytes + 5 * 64, current));
}

#[test]
fn slots_kept_for_one_thread_are_there_for_another_when_the_pool_is_full() {
    let folder = Folder::new("kept");
    let pool = folder.pool(1 << 20, Durability::ProcessCrash);
    let all = |pool: &PersistentPool| {
        let mut all = Vec::new();
        while let Ok(object) = pool.transaction(|tx| tx.alloc([1u64; 16])) {
            all.push(object);
        }
        all
    };
    let mut first = all(&pool);
    let count = first.len();
    assert!(count > 1000, "{count}");
    // Another thread frees them, keeps some of their slots, and stays.
    let (freed, may_end) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        let objects = std::mem::take(&mut first);
        scope.spawn(|| {
            objects.into_iter().for_each(|object| pool.transaction(|tx| tx.free(object)).unwrap());
            let one = pool.transaction(|tx| tx.alloc([2u64; 16])).unwrap();
            pool.transaction(|tx| tx.free(one)).unwrap();
            freed.wait();
            may_end.wait();
        });
        freed.wait();
        assert_eq!(all(&pool).len(), count);
        may_end.wait();
    });
    // All of it goes to other types, too.
    let mut live = Vec::new();
    pool.read(|r| {
        r.for_each::<[u64; 16]>(|pointer, _| {
            live.push(pointer);
            true
        })
    })
    .unwrap();
    assert_eq!(live.len(), count);
    live.into_iter().for_each(|object| pool.transaction(|tx| tx.free(object)).unwrap());
    let mut pages = 0;
    while pool.transaction(|tx| tx.alloc([3u64; 512])).is_ok() {
        pages += 1;
    }
    assert!(pages * 4096 > count * 128 * 9 / 10, "{pages} pages");
}
