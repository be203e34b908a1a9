# The guest: a multiboot program that keeps rewriting its memory and checks it. guest.rs tells what and why.
#
# Everything is at fixed addresses, so there is nothing to relocate: the loader puts the image at BASE. State
# and stack lie in one page behind it and move with it. No interrupts, no paging, one processor.
#
# QEMU 7.2 under emulation has a fault of its own: a page whose translation stays cached over a bitmap sync is
# not seen to be written again, so from the third pass on a source loses the pages a guest is busiest with.
# The guest gives it no chance: it drops a page's translation (invlpg) before the first write, and again before
# it writes the last word once more, so that a sync in the middle of the page does no harm. The page of the
# state is treated likewise, once a page.
#
# value of a word: mix(address of its page, round) + STEP * (its index in the page)

        .pushsection .rodata.multifd_testkit_guest, "a", @progbits
        .balign 4
        .globl  multifd_testkit_guest_start
        .globl  multifd_testkit_guest_end
        .code32

        .set    .Lg_base, 0x100000
        .set    .Lg_round, .Lg_base + 0x8000
        .set    .Lg_cursor, .Lg_base + 0x8004
        .set    .Lg_burst_left, .Lg_base + 0x8008
        .set    .Lg_stack, .Lg_base + 0x9000
        .set    .Lg_bss_end, .Lg_base + 0x10000
        .set    .Lg_step, 0x9e3779b9
        .set    .Lg_words, 1024

multifd_testkit_guest_start:
.Lg_start:
        .long   0x1badb002
        .long   0x00010000
        .long   -(0x1badb002 + 0x00010000)
        .long   .Lg_base
        .long   .Lg_base
        .long   0
        .long   .Lg_bss_end
        .long   .Lg_base + (.Lg_entry - .Lg_start)

# The parameters, patched by guest.rs.
        .set    .Lg_set_start, .Lg_base + 32
        .set    .Lg_set_pages, .Lg_base + 36
        .set    .Lg_fill_start, .Lg_base + 40
        .set    .Lg_fill_pages, .Lg_base + 44
        .set    .Lg_zero_every, .Lg_base + 48
        .set    .Lg_fill_checks, .Lg_base + 52
        .set    .Lg_seed, .Lg_base + 56
        .set    .Lg_burst, .Lg_base + 60
        .set    .Lg_pause, .Lg_base + 64
        .set    .Lg_stride, .Lg_base + 68
        .skip   40

.Lg_entry:
        cli
        cld
        movl    $.Lg_stack, %esp
        xorl    %eax, %eax
        movl    %eax, .Lg_round
        movl    %eax, .Lg_cursor
        movl    .Lg_burst, %eax
        movl    %eax, .Lg_burst_left

# Fill once.
        xorl    %ebx, %ebx
.Lg_fill:
        cmpl    .Lg_fill_pages, %ebx
        jae     .Lg_fill_done
        call    .Lg_filled_page
        jc      .Lg_fill_next
        call    .Lg_write
.Lg_fill_next:
        incl    %ebx
        jmp     .Lg_fill
.Lg_fill_done:

# Round 0 writes the working set without a check.
        xorl    %ebx, %ebx
.Lg_first:
        cmpl    .Lg_set_pages, %ebx
        jae     .Lg_first_done
        movl    %ebx, %edi
        shll    $12, %edi
        addl    .Lg_set_start, %edi
        movl    .Lg_round, %edx
        call    .Lg_mix
        call    .Lg_write
        incl    %ebx
        jmp     .Lg_first
.Lg_first_done:
        call    .Lg_report

.Lg_next_round:
        invlpg  .Lg_round
        incl    .Lg_round
        xorl    %ebx, %ebx
.Lg_page:
        cmpl    .Lg_set_pages, %ebx
        jae     .Lg_filled
# The page at the position in this round, times the stride.
        movl    %ebx, %eax
        mull    .Lg_stride
        divl    .Lg_set_pages
        movl    %edx, %edi
        shll    $12, %edi
        addl    .Lg_set_start, %edi
        movl    .Lg_round, %edx
        decl    %edx
        call    .Lg_mix
        movl    %edx, %esi
        movl    .Lg_round, %edx
        call    .Lg_mix
        movl    $.Lg_words, %ecx
        invlpg  (%edi)
.Lg_word:
        movl    (%edi), %eax
        cmpl    %esi, %eax
        jne     .Lg_bad
        movl    %edx, (%edi)
        addl    $.Lg_step, %esi
        addl    $.Lg_step, %edx
        addl    $4, %edi
        decl    %ecx
        jnz     .Lg_word
# The last word again, and a word of the state; see the head of the file.
        invlpg  -4(%edi)
        movl    -4(%edi), %eax
        movl    %eax, -4(%edi)
        invlpg  .Lg_round
        movl    .Lg_round, %eax
        movl    %eax, .Lg_round
        incl    %ebx
        cmpl    $0, .Lg_burst
        je      .Lg_page
        decl    .Lg_burst_left
        jnz     .Lg_page
        movl    .Lg_burst, %eax
        movl    %eax, .Lg_burst_left
        movl    .Lg_pause, %ecx
        testl   %ecx, %ecx
        jz      .Lg_page
.Lg_idle:
        decl    %ecx
        jnz     .Lg_idle
        jmp     .Lg_page

# Some of the filled pages, going on where the last round ended.
.Lg_filled:
        movl    .Lg_fill_checks, %ebp
.Lg_filled_one:
        testl   %ebp, %ebp
        jz      .Lg_round_done
        movl    .Lg_cursor, %ebx
        cmpl    .Lg_fill_pages, %ebx
        jb      .Lg_cursor_ok
        xorl    %ebx, %ebx
.Lg_cursor_ok:
        call    .Lg_filled_page
        movl    $.Lg_step, %ecx
        jnc     .Lg_filled_data
        xorl    %ecx, %ecx
        xorl    %edx, %edx
.Lg_filled_data:
        movl    %edx, %esi
        movl    %ecx, %edx
        movl    $.Lg_words, %ecx
.Lg_filled_word:
        movl    (%edi), %eax
        cmpl    %esi, %eax
        jne     .Lg_bad
        addl    %edx, %esi
        addl    $4, %edi
        decl    %ecx
        jnz     .Lg_filled_word
        incl    %ebx
        invlpg  .Lg_cursor
        movl    %ebx, .Lg_cursor
        decl    %ebp
        jmp     .Lg_filled_one
.Lg_round_done:
        call    .Lg_report
        jmp     .Lg_next_round

# Page ebx of the filled ones: address to edi, first word to edx; carry set if it stays zero.
.Lg_filled_page:
        movl    %ebx, %edi
        shll    $12, %edi
        addl    .Lg_fill_start, %edi
        movl    .Lg_zero_every, %ecx
        testl   %ecx, %ecx
        jz      .Lg_filled_not_zero
        movl    %ebx, %eax
        incl    %eax
        xorl    %edx, %edx
        divl    %ecx
        testl   %edx, %edx
        jz      .Lg_filled_zero
.Lg_filled_not_zero:
        movl    $0xffffffff, %edx
        call    .Lg_mix
        clc
        ret
.Lg_filled_zero:
        stc
        ret

# First word of the page at edi in round edx, to edx. Uses eax.
.Lg_mix:
        imull   $0x85ebca6b, %edx, %edx
        addl    .Lg_seed, %edx
        imull   $0x9e3779b1, %edi, %eax
        xorl    %eax, %edx
        imull   $0xc2b2ae35, %edx, %edx
        movl    %edx, %eax
        shrl    $15, %eax
        xorl    %eax, %edx
        ret

# Writes a page at edi, first word edx.
.Lg_write:
        movl    $.Lg_words, %ecx
.Lg_write_word:
        movl    %edx, (%edi)
        addl    $.Lg_step, %edx
        addl    $4, %edi
        decl    %ecx
        jnz     .Lg_write_word
        ret

# A wrong word: edi its address, esi what it should be, eax what it is.
.Lg_bad:
        pushl   %eax
        pushl   %esi
        movl    $.Lg_base + (.Lg_text_bad - .Lg_start), %esi
        call    .Lg_text
        movl    %edi, %edx
        call    .Lg_hex
        movl    $.Lg_base + (.Lg_text_want - .Lg_start), %esi
        call    .Lg_text
        popl    %edx
        call    .Lg_hex
        movl    $.Lg_base + (.Lg_text_got - .Lg_start), %esi
        call    .Lg_text
        popl    %edx
        call    .Lg_hex
        movl    $.Lg_base + (.Lg_text_round - .Lg_start), %esi
        call    .Lg_text
        movl    .Lg_round, %edx
        call    .Lg_hex
        movb    $10, %al
        call    .Lg_put
.Lg_halt:
        hlt
        jmp     .Lg_halt

# The line of a round that is done.
.Lg_report:
        movb    $'R', %al
        call    .Lg_put
        movb    $' ', %al
        call    .Lg_put
        movl    .Lg_round, %edx
        call    .Lg_hex
        movb    $10, %al
        jmp     .Lg_put

# The text at esi, up to a zero byte.
.Lg_text:
        movb    (%esi), %al
        testb   %al, %al
        jz      .Lg_return
        call    .Lg_put
        incl    %esi
        jmp     .Lg_text

# The eight digits of edx.
.Lg_hex:
        movl    $8, %ecx
.Lg_digit:
        roll    $4, %edx
        movb    %dl, %al
        andb    $15, %al
        cmpb    $10, %al
        jb      .Lg_decimal
        addb    $('a' - '0' - 10), %al
.Lg_decimal:
        addb    $'0', %al
        call    .Lg_put
        decl    %ecx
        jnz     .Lg_digit
.Lg_return:
        ret

# The character in al, to the serial port, when that has room.
.Lg_put:
        pushl   %edx
        pushl   %eax
        movl    $0x3fd, %edx
.Lg_full:
        inb     %dx, %al
        testb   $0x20, %al
        jz      .Lg_full
        popl    %eax
        movl    $0x3f8, %edx
        outb    %al, %dx
        popl    %edx
        ret

.Lg_text_bad:
        .asciz  "BAD addr="
.Lg_text_want:
        .asciz  " want="
.Lg_text_got:
        .asciz  " got="
.Lg_text_round:
        .asciz  " round="
multifd_testkit_guest_end:
        .code64
        .popsection
