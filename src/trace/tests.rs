//! Good and bad files of every format.

use std::io::Write;

use super::*;

fn record(kind: u8, stream: u8, id: u32, bytes: u64) -> Vec<u8> {
    let mut record = vec![kind, stream, 0, 0];
    record.extend(id.to_le_bytes());
    record.extend(bytes.to_le_bytes());
    record
}

fn fault(bytes: &[u8]) -> (u64, &'static str) {
    match Trace::parse(bytes) {
        Err(Error::Corrupt { at, what, .. }) => (at, what),
        other => panic!("taken for a trace: {other:?}"),
    }
}

#[test]
fn records_plain_and_gzipped() {
    let bytes =
        [record(0, 3, 9, 100), record(0, 1, 4, 0), record(1, 1, 9, 100), record(0, 3, 9, 50)].concat();
    let trace = Trace::parse(&bytes).unwrap();
    let expected = [
        Event::Alloc { id: 0, stream: 0, bytes: 100 },
        Event::Alloc { id: 1, stream: 1, bytes: 1 },
        Event::Free { id: 0, stream: 1 },
        Event::Alloc { id: 2, stream: 0, bytes: 50 },
    ];
    assert_eq!(trace.events(), expected);
    assert_eq!((trace.allocations(), trace.streams(), trace.peak_live()), (3, 2, 101));
    let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    zipped.write_all(&bytes).unwrap();
    let zipped = zipped.finish().unwrap();
    assert_eq!(Trace::parse(&zipped).unwrap(), trace);
    assert_eq!(fault(&zipped[..zipped.len() - 9]).1, "an intact gzip stream");
}

#[test]
fn bad_records_say_where_and_what() {
    assert_eq!(fault(&[]).1, "a trace; the file is empty");
    let good = record(0, 0, 1, 8);
    assert_eq!(fault(&[&good[..], &good[..7]].concat()).0, 16);
    assert_eq!(fault(&[good.clone(), record(7, 0, 2, 8)].concat()).0, 16);
    assert_eq!(fault(&[good.clone(), record(1, 0, 2, 8)].concat()), (20, "the id of a live allocation"));
    assert_eq!(fault(&[good.clone(), good.clone()].concat()).0, 16);
    let twice = [good.clone(), record(1, 0, 1, 8), record(1, 0, 1, 8)].concat();
    assert_eq!(fault(&twice).0, 36);
    assert!(fault(b"\x7fELF and more that is no trace").1.contains("16-byte records"));
    let endless = [record(0, 0, 1, u64::MAX), record(0, 0, 2, 1)].concat();
    assert_eq!(fault(&endless).1, "sizes whose sum is below 2^64");
}

#[test]
fn logs_of_rmm() {
    let log = "Thread,Time,Action,Pointer,Size,Stream\n\
               7,10:00:00:000001,allocate,0x7f00,4096,0x1\n\
               7,10:00:00:000002,allocate failure,(nil),99999,0x1\n\
               8,10:00:00:000003,allocate,0x8f00,16,0x2\r\n\
               7,10:00:00:000004,free,0x7f00,4096,0x2\n";
    let trace = Trace::parse(log.as_bytes()).unwrap();
    assert_eq!((trace.events().len(), trace.streams(), trace.peak_live()), (3, 2, 4112));
    assert_eq!(trace.events()[2], Event::Free { id: 0, stream: 1 });
    for (wrong, what) in [
        ("7,now,allocate,0x1,4", "six fields in a line"),
        ("7,now,allocate,0x1,four,0", "numbers for pointer, size and stream"),
        ("7,now,free,0x1,4,0", "the pointer of a live allocation"),
        ("7,now,explode,0x1,4,0", "an action: allocate, free or allocate failure"),
    ] {
        let log = format!("Thread,Time,Action,Pointer,Size,Stream\n{wrong}\n");
        assert_eq!(fault(log.as_bytes()), (39, what));
    }
}

/// What `pickle.dumps` writes for a snapshot with one device and four events, protocol 2.
fn snapshot(actions: [(&str, u32); 4]) -> Vec<u8> {
    let text = |text: &str| [&[b'X'][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let number = |value: u32| [&[b'J'][..], &value.to_le_bytes()].concat();
    let events = actions.map(|(action, addr)| {
        let fields = [
            text("action"),
            text(action),
            text("addr"),
            number(addr),
            text("size"),
            number(512),
            text("stream"),
            number(0),
        ];
        [&b"}("[..], &fields.concat(), b"u"].concat()
    });
    let mut bytes = b"\x80\x02}".to_vec();
    // A list of one list of the events; then the entry and the dictionary end.
    bytes.extend([text("device_traces"), b"](](".to_vec(), events.concat(), b"ees.".to_vec()].concat());
    bytes
}

#[test]
fn snapshots_of_pytorch() {
    let bytes = snapshot([("free_requested", 1), ("alloc", 2), ("segment_alloc", 3), ("free_requested", 2)]);
    let trace = Trace::parse(&bytes).unwrap();
    let expected = [Event::Alloc { id: 0, stream: 0, bytes: 512 }, Event::Free { id: 0, stream: 0 }];
    assert_eq!(trace.events(), expected);
    assert!(fault(&bytes[..bytes.len() - 20]).1.contains("cut short"));
    assert!(fault(b"\x80\x02}.").1.contains("device_traces"));
}

/// As Python writes it: two devices, frames, names mentioned again, objects of classes, a set, a number of 71 bits.
#[test]
fn snapshots_as_python_writes_them() {
    let second = b"\x80\x02}q\x00X\r\x00\x00\x00device_tracesq\x01]q\x02(]q\x03]q\x04(}q\x05(X\x06\x00\x00\x00actionq\x06\
        X\x05\x00\x00\x00allocq\x07X\x04\x00\x00\x00addrq\x08\x8a\x06\x00\x00\x00\x00\x00\x7fX\x04\x00\x00\x00sizeq\tM\x00\x10\
        X\x06\x00\x00\x00streamq\nK\x00X\x06\x00\x00\x00framesq\x0bccollections\nOrderedDict\nq\x0c)Rq\rX\x01\x00\x00\x00aq\x0e\
        J\xff\xff\xff\xffsu}q\x0f(h\x06X\x0e\x00\x00\x00free_requestedq\x10h\x08\x8a\x06\x00\x00\x00\x00\x00\x7fh\tM\x00\x10\
        h\nK\x00X\x04\x00\x00\x00moreq\x11(G?\xf8\x00\x00\x00\x00\x00\x00c_codecs\nencode\nq\x12X\x02\x00\x00\x00xxq\x13\
        X\x06\x00\x00\x00latin1q\x14\x86q\x15Rq\x16Nc__builtin__\nset\nq\x17]q\x18(K\x01K\x02e\x85q\x19Rq\x1a\
        \x8a\t\x00\x00\x00\x00\x00\x00\x00\x00@tq\x1buees.";
    let fifth = b"\x80\x05\x95\xe1\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\rdevice_traces\x94]\x94(]\x94]\x94(}\x94(\x8c\x06action\x94\
        \x8c\x05alloc\x94\x8c\x04addr\x94\x8a\x06\x00\x00\x00\x00\x00\x7f\x8c\x04size\x94M\x00\x10\x8c\x06stream\x94K\x00\
        \x8c\x06frames\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94\x8c\x01a\x94J\xff\xff\xff\xffsu}\x94(h\x06\
        \x8c\x0efree_requested\x94h\x08\x8a\x06\x00\x00\x00\x00\x00\x7fh\tM\x00\x10h\nK\x00\x8c\x04more\x94(\
        G?\xf8\x00\x00\x00\x00\x00\x00C\x02xx\x94N\x8f\x94(K\x01K\x02\x90\x8a\t\x00\x00\x00\x00\x00\x00\x00\x00@t\x94uees.";
    for bytes in [&second[..], fifth] {
        let trace = Trace::parse(bytes).unwrap();
        let expected = [Event::Alloc { id: 0, stream: 0, bytes: 4096 }, Event::Free { id: 0, stream: 0 }];
        assert_eq!(trace.events(), expected);
        for cut in 0..bytes.len() {
            assert!(Trace::parse(&bytes[..cut]).is_err());
        }
    }
}

#[test]
fn no_prefix_or_flip_of_a_file_panics() {
    let pickle = snapshot([("alloc", 1), ("alloc", 2), ("free_requested", 1), ("oom", 0)]);
    let records: Vec<u8> = (0..8).flat_map(|id| record(id as u8 % 2, 0, id / 2, 64)).collect();
    let log = b"Thread,Time,Action,Pointer,Size,Stream\n1,2,allocate,0x1,4,0\n".to_vec();
    for file in [pickle, records, log] {
        for cut in 0..file.len() {
            let _ = Trace::parse(&file[..cut]);
            for bit in 0..8 {
                let mut flipped = file.clone();
                flipped[cut] ^= 1 << bit;
                if let Ok(trace) = Trace::parse(&flipped) {
                    assert!(trace.allocations() > 0);
                }
            }
        }
    }
}
